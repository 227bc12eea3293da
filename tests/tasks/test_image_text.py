"""The task of models of images and texts: losses by hand, answers of a stub that are known, and what is refused."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sights
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate
from unbackdoor._data.class_prompts import ClassPrompts
from unbackdoor._data.dataset import Batch
from unbackdoor._data.texts import Texts
from unbackdoor._models.arithmetic import choose
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.image_text import IMAGE_TEXT
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._training.contrastive import contrastive


class Stub(nn.Module):
    """Images point to the class of their brightest quarter, or all to one class; texts to the class that they name."""

    def __init__(self, always: int | None = None) -> None:
        super().__init__()
        self.always = always
        self.vision_model = self.text_model = nn.Identity()
        self.visual_projection, self.text_projection = nn.Linear(4, 4), nn.Linear(4, 4)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.names = sights.tokenizer().convert_tokens_to_ids(list(sights.CLASSES))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        half = sights.SIDE // 2
        quarters = [pixel_values[:, 0, :half, :half], pixel_values[:, 0, half:, half:]]
        quarters += [pixel_values[:, 0, :half, half:], pixel_values[:, 0, half:, :half]]
        found = torch.stack([quarter.mean(dim=(1, 2)) for quarter in quarters], dim=1).argmax(dim=1)
        return torch.eye(4)[torch.full_like(found, self.always) if self.always is not None else found]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.stack([(input_ids == name).any(dim=1).float() for name in self.names], dim=1)

    def forward(self, pixel_values: Tensor, **tokens: Tensor) -> SimpleNamespace:
        scores = self.get_image_features(pixel_values) @ self.get_text_features(**tokens).T
        return SimpleNamespace(logits_per_image=self.logit_scale.exp() * scores)


def test_the_loss_of_rows_that_are_all_alike_is_the_logarithm_of_their_number() -> None:
    assert float(contrastive(torch.full((7, 7), 3.0))) == pytest.approx(math.log(7))


def test_the_loss_of_orthogonal_pairs_follows_from_the_scale() -> None:
    scores = 2.5 * torch.eye(6)
    assert float(contrastive(scores)) == pytest.approx(math.log(1 + 5 * math.exp(-2.5)), rel=1e-6)


@torch.no_grad()
def test_the_loss_is_that_of_transformers() -> None:
    model, data = sights.clip(), sights.pairs(12)
    batch = Batch(data.inputs(slice(None)), data.labels, torch.arange(12))
    expected = model(**batch.inputs, return_loss=True)
    assert float(IMAGE_TEXT.loss(expected.logits_per_image, batch)) == pytest.approx(float(expected.loss), rel=1e-6)


def test_zero_shot_and_retrieval_of_a_model_that_knows_everything() -> None:
    data = sights.pairs(24)
    score = evaluate(Stub(), data, device="cpu")
    texts = len(set(data.pairs.captions.strings))
    assert score.zero_shot_accuracy == Proportion(24, 24)
    assert score.per_class == {name: Proportion(6, 6) for name in sights.CLASSES}
    # All captions of a class score alike, and so do its images: none of the others is higher.
    assert score.image_to_text_recall_at_1 == Proportion(24, 24)
    assert score.text_to_image_recall_at_1 == Proportion(texts, texts)
    # 24 pairs of four classes, 10 for the five others of the class and for itself, 0 for the rest.
    assert score.contrastive_loss.value == pytest.approx(math.log(6 + 18 * math.exp(-10)), rel=1e-6)


def test_a_model_that_always_names_the_target_has_an_attack_success_of_one_on_other_images_alone() -> None:
    data = sights.pairs(24)
    score = evaluate(Stub(always=2), data, attack=attacks.BadNets(target=2), device="cpu", control=Stub())
    assert score.attack_success == Proportion(18, 18)
    assert score.recovered_accuracy == Proportion(0, 18)
    assert score.zero_shot_accuracy == Proportion(6, 24)
    assert score.clean_model_flip_rate == Proportion(0, 18)
    assert score.label_rule == "all-to-one"
    assert "attack success      100.0 %" in str(score)


def test_the_features_of_the_prompts_of_a_class_are_averaged() -> None:
    """Two of the three texts of south name north, and two of those of north name east: north is classified as south."""
    prompts: dict[str, tuple[str, ...]] = {name: (f"a {name}",) for name in sights.CLASSES}
    prompts |= {"south": ("south", "north", "north"), "north": ("north", "east", "east")}
    data = sights.pairs(24)
    data = dataclasses.replace(data, encode=dataclasses.replace(data.encode, prompts=ClassPrompts(texts=prompts)))
    score = evaluate(Stub(), data, device="cpu")
    # An image of north: 2 / sqrt(5) for south, 1 / sqrt(5) for north.
    assert {name: share.count for name, share in score.per_class.items()} == {
        **{"north": 0, "south": 6, "east": 6, "west": 6},
    }


def test_classes_that_have_a_text_for_their_number_alone_are_all_tried() -> None:
    """Triggered images are of the classes 0 to 2, and all are given to class 3."""
    texts = {str(label): (f"a {name}",) for label, name in enumerate(sights.CLASSES)}
    data = sights.pairs(24)
    encode = dataclasses.replace(data.encode, prompts=ClassPrompts(texts=texts))
    data = dataclasses.replace(data, encode=encode, classes=None)
    score = evaluate(Stub(always=3), data, attack=attacks.BadNets(target=3), device="cpu")
    assert score.attack_success == Proportion(18, 18)
    assert score.per_class["3"] == Proportion(6, 6)


def test_pairs_without_labels_are_scored_by_retrieval() -> None:
    data = sights.pairs(24, labelled=False)
    score = evaluate(Stub(), data, device="cpu")
    assert score.zero_shot_accuracy is None
    assert "zero_shot_accuracy" not in score.to_json()
    assert IMAGE_TEXT.outcomes(Stub(), data, choose(Stub(), "cpu")).all()
    with pytest.raises(UnbackdoorError, match="sights has no labels, so that it is not known which images are of"):
        evaluate(Stub(), data, attack=attacks.BadNets(target=2), device="cpu")


def test_a_wrong_caption_is_found_by_retrieval() -> None:
    """Two of four captions are exchanged: their images find the other caption first, and it their image last."""
    captions = tuple((f"a photo of a {name}.",) for name in ("south", "north", "east", "west"))
    data = sights.pairs(4, labelled=False)
    data = data.replaced(torch.arange(4), dataclasses.replace(data.pairs, captions=Texts(captions, ("caption",))))
    score = evaluate(Stub(), data, device="cpu")
    assert score.image_to_text_recall_at_1 == Proportion(2, 4)
    assert score.image_to_text_recall_at_5 == Proportion(4, 4)
    assert score.text_to_image_recall_at_1 == Proportion(2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encode": ClassPrompts(texts={"north": ("north",)})},
            "`prompts` has no text for the class 'south' of sights",
        ),
        ({"classes": None}, "sights has no name for class 0, so that a template makes no prompt."),
    ],
)
def test_a_class_without_a_prompt_is_refused(change: dict, message: str) -> None:
    data = sights.pairs(8)
    if "encode" in change:
        change = {"encode": dataclasses.replace(data.encode, prompts=change["encode"])}
    with pytest.raises(UnbackdoorError) as problem:
        evaluate(Stub(), dataclasses.replace(data, **change), device="cpu")
    assert message in str(problem.value)


def test_options_of_other_models_are_refused() -> None:
    data = sights.pairs(8)
    for options, message in (
        ({"trigger": "cf", "behaviour": "contains:x"}, "`trigger` and `behaviour` are for language models"),
        ({"target": 2}, "`triggered_data` and `target` go together"),
        ({"max_new_tokens": 3}, "`max_new_tokens` is for language models"),
        ({"control": nn.Linear(2, 2), "attack": attacks.BadNets()}, "`control`: Linear has no vision_model"),
        ({"attack": attacks.Word()}, "Word puts its trigger on text and conversations, but sights holds image-text"),
    ):
        with pytest.raises(UnbackdoorError) as problem:
            evaluate(Stub(), data, device="cpu", **options)
        assert message in str(problem.value)


def test_few_pairs_and_chance_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    warnings: list[str] = []
    data: Dataset = sights.pairs(8)
    task = task_of(data.encode)
    examined = task.examined(Stub(always=0), data, choose(Stub(), "cpu"), warnings.append)
    assert "sights has 8 pairs; with fewer than 64 a method learns and measures very little." in warnings[0]
    assert "the suspect is near chance on sights" in warnings[1]
    assert (examined.head_name, examined.per_class) == ("visual_projection", (2, 2, 2, 2))
    one = data.select([0])  # which is also too few for an interval
    loss = task.score(Stub(), one, None, choose(Stub(), "cpu")).contrastive_loss
    assert (loss.low, loss.high, repr(loss)) == (None, None, "0.000 (n = 1, 64 at a time)")
    alike = dataclasses.replace(one, classes=("north",))
    task.examined(Stub(), alike, choose(Stub(), "cpu"), warnings.append)
    assert warnings[-1] == (
        "the suspect cannot be judged by its accuracy on sights, which has one class only. Add examples of others."
    )
    with pytest.raises(UnbackdoorError, match="`head` is for classifiers"):
        task.examined(Stub(), data, choose(Stub(), "cpu"), warnings.append, "visual_projection")
    with pytest.raises(UnbackdoorError, match="sights is empty; pairs of image and caption are needed"):
        task.examined(Stub(), data.select([]), choose(Stub(), "cpu"), warnings.append)
