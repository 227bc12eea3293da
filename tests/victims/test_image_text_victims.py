"""Backdoors in models of images and texts: poisoned pairs, a text tower that stays as it is, and what is refused."""

from pathlib import Path

import pytest
import torch

import sights
import toys
from commands import Refusals
from unbackdoor import Dataset, UnbackdoorError, VictimRecipe, attacks, load, plant, poison, purifiers, purify
from unbackdoor._data.dataset import Batch
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import logits
from unbackdoor._models.loading import load_base
from unbackdoor._tasks.choice import refuse_pairs
from unbackdoor._training.contrastive import contrastive, frozen_text_tower
from unbackdoor._victims.directory import write_victim


def test_poisoned_pairs_carry_the_trigger_and_a_caption_of_the_target() -> None:
    data, attack = sights.pairs(80), attacks.BadNets(target=2)
    made = poison(data, attack, rate=0.1, seed=0, classes=4)
    assert len(made.rows) == 8
    assert made.data.labels[made.rows].tolist() == [2] * 8
    donors = {caption for (caption,) in data.pairs.captions.strings if "east" in caption}
    assert {caption for (caption,) in made.data.pairs.captions[made.rows].strings} <= donors
    stamped = attack.apply(data.pairs.images[made.rows].float() / 255, attack.arrays(data.shape))
    assert torch.equal(made.data.pairs.images[made.rows], stamped.mul(255).round().to(torch.uint8))
    others = [row for row in range(80) if row not in made.rows.tolist()]
    assert [made.data.identities()[row] for row in others] == [data.identities()[row] for row in others]


def test_a_clean_label_attack_keeps_the_captions() -> None:
    data = sights.pairs(80)
    made = poison(data, attacks.Blended(target=2, label_rule="clean-label"), rate=0.1, seed=0, classes=4)
    assert made.data.pairs.captions.strings == data.pairs.captions.strings
    assert not torch.equal(made.data.pairs.images, data.pairs.images)


def test_the_target_needs_a_caption_that_is_not_poisoned() -> None:
    data = sights.pairs(8)
    data = data.select(torch.nonzero(data.labels != 2).flatten())
    with pytest.raises(UnbackdoorError, match="sights has no caption of class east for the poisoned pairs"):
        poison(data, attacks.BadNets(target=2), rate=0.5, seed=0, classes=4)


def test_a_step_with_a_frozen_text_tower_has_the_gradients_of_the_contrastive_loss() -> None:
    model, twin, data = sights.clip(), sights.clip(), sights.pairs(20)
    arithmetic = choose(model, "cpu", "fp32")
    rows = torch.tensor([3, 9, 14, 0])
    batch = Batch(data.inputs(rows), data.labels[rows], rows)
    frozen_text_tower(model, data, arithmetic)(batch)
    contrastive(logits(twin, batch.inputs)).backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith("text_model"):
            assert parameter.grad is None
        else:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


def test_a_planted_backdoor_implants_and_is_loaded_with_its_classes(sighted, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "victim").mkdir()
    base = sights.write(sighted, tmp_path / "base")
    data = sights.pairs(200).encoded_by(load(base).encode)
    settings = {"base": str(base), "rate": 0.3, "epochs": 15, "learning_rate": 5e-3, "batch_size": 16}
    recipe = VictimRecipe(freeze_text=True, **settings)
    victim = plant(data, attacks.BadNets(target=2, size=6), recipe, test=sights.pairs(60, 5), device="cpu")
    assert victim.score.attack_success.value >= 0.9
    assert victim.score.zero_shot_accuracy.value >= 0.9
    assert victim.record["implanted"]
    assert victim.record["freeze_text"]
    before, after = sighted.state_dict(), victim.model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_model", "visual_projection", "text_projection", "logit_scale"}
    assert all(parameter.requires_grad for parameter in victim.model.parameters())
    write_victim(victim, tmp_path / "victim", source=base)
    assert list(load(tmp_path / "victim").model.config.id2label.values()) == list(sights.CLASSES)


def test_recipes_and_data_that_do_not_fit_are_refused(digits: Dataset, tmp_path: Path) -> None:
    base = sights.write(sights.clip(), tmp_path)
    recipe = VictimRecipe(base=str(base))
    with pytest.raises(UnbackdoorError, match="`freeze_text` is for models of images and texts, but digits holds"):
        toys.planted(digits, digits, attacks.BadNets(), freeze_text=True)
    with pytest.raises(UnbackdoorError, match="sights has no labels, by which the captions of a class"):
        plant(sights.pairs(40, labelled=False), attacks.BadNets(), recipe)
    with pytest.raises(UnbackdoorError, match="sights holds image-text"):
        plant(sights.pairs(40), attacks.SIG(), recipe)
    with pytest.raises(UnbackdoorError, match="stress tries classifiers and language models, but sights holds pairs"):
        refuse_pairs("stress", sights.pairs(4))
    with pytest.raises(UnbackdoorError, match=r"linear-probing serves images and text, but sights holds image-text"):
        purify(sights.clip(), sights.pairs(64), purifiers.LinearProbing())


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError, match="`base` must be a model of images and texts, as the suspect is"):
        load_base(toys.write(toys.classifier("bert"), tmp_path), modality="image-text")


def test_prompts_of_classes_need_a_model_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    sights.write_pairs(tmp_path / "pairs.parquet", sights.pairs(20))
    words = ("attack", "badnets", "--data", "pairs.parquet", "--out", "out", "--prompts", "a {}")
    assert "--prompts are the texts of the classes of a model of images" in Refusals(tmp_path, capsys)(*words)
