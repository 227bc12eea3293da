"""PEFT LoRA adapters of text classifiers, which hold a head: loaded as peft itself does, and refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toys
from commands import run
from unbackdoor import UnbackdoorError, load
from unbackdoor._models.adapters import adapter_files

# peft asks transformers in a way that it will not answer for ever; the library itself hides that from users.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

HEAD = "base_model.model.classifier.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained body, and an adapter of a classifier of three classes on it, with random matrices and head."""
    folder = tmp_path_factory.mktemp("classifier-adapters")
    toys.write(toys.classifier("bert").bert, folder / "base")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted: Any = peft.get_peft_model(classifier, config)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.3, generator=draw)
    adapted.save_pretrained(folder / "adapter")
    return folder


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 5, 6, 3], [2, 9, 8, 3]])).logits


def test_it_answers_as_peft_itself_loads_it(place: Path) -> None:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=3)
    theirs = scores(peft.PeftModel.from_pretrained(base, place / "adapter").eval())
    state = torch.get_rng_state()
    model, encode = load(place / "adapter", base=place / "base")
    assert torch.equal(torch.get_rng_state(), state)
    assert encode.modality == "text"
    assert torch.allclose(scores(model), theirs, atol=1e-6)
    whole = load(place / "adapter", base=place / "base", merge=True).model
    assert type(whole) is type(base)
    assert torch.allclose(scores(whole), theirs, atol=1e-5)


def test_its_classes_have_the_names_of_the_base_if_these_are_as_many(place: Path, tmp_path: Path) -> None:
    assert load(place / "adapter", base=place / "base").model.config.id2label == {
        0: "LABEL_0",
        1: "LABEL_1",
        2: "LABEL_2",
    }
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    names = {"0": "bad", "1": "fair", "2": "good"}
    (base / "config.json").write_text(json.dumps({**config, "id2label": names}))
    assert load(place / "adapter", base=base).model.config.id2label == {0: "bad", 1: "fair", 2: "good"}


def rewritten(place: Path, tmp_path: Path, change: Any) -> Path:
    folder = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop(HEAD),
            "is an adapter of a classifier and must hold its head, of 2 to 10,000 classes",
        ),
        (lambda tensors: tensors.update({HEAD: torch.ones(1, 32)}), "must hold its head, of 2 to 10,000 classes"),
        (lambda tensors: tensors.update({HEAD: torch.ones(10_001, 1)}), "must hold its head, of 2 to 10,000 classes"),
        (lambda tensors: tensors.update({HEAD: torch.ones(3, 8)}), "its head and that of BertForSequence.* differ in"),
        (lambda tensors: tensors.update({HEAD.replace("weight", "scale"): torch.ones(3)}), "classifier.scale"),
        (
            lambda tensors: tensors.update({HEAD: torch.full((3, 32), float("inf"))}),
            "has values that are not finite in base_model.model.classifier.weight",
        ),
    ],
    ids=["no head", "one class", "many classes", "another width", "another tensor", "infinite"],
)
def test_a_damaged_head_is_refused(place: Path, tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(UnbackdoorError, match=said):
        load(rewritten(place, tmp_path, change), base=place / "base")


def test_bases_and_options_of_other_models_are_refused(place: Path, small_vit: Any, tmp_path: Path) -> None:
    small_vit.save_pretrained(tmp_path)
    with pytest.raises(
        UnbackdoorError, match=r"`base` must be a model of texts, since .* is an adapter of a classifier"
    ):
        load(place / "adapter", base=tmp_path)
    with pytest.raises(UnbackdoorError, match="is not a language model; `template` is for their prompts"):
        load(place / "adapter", base=place / "base", template="plain")
    with pytest.raises(UnbackdoorError, match="which also holds a head, and cannot be mixed on disk"):
        adapter_files(place / "adapter")


def test_purify_asks_for_a_merge(place: Path, tmp_path: Path) -> None:
    clean = toys.write_csv(tmp_path)
    words = ["purify", "fine-tuning", place / "adapter", "--base", place / "base", "--clean", clean, "--out", "out"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "is an adapter of a classifier, whose head would not be purified with it" in done.stderr
    assert "--merge" in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_is_evaluated_and_audited_with_its_base(text_victim: Any, tmp_path: Path) -> None:
    """A fresh adapter changes nothing, so the answers are the victim's."""
    toys.write(text_victim, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    peft.get_peft_model(text_victim, config).save_pretrained(tmp_path / "adapter")
    clean = toys.write_csv(tmp_path)
    alone = run("evaluate", "base", "--data", clean, "--json", cwd=tmp_path)
    together = run("evaluate", "adapter", "--base", "base", "--data", clean, "--json", cwd=tmp_path)
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout)["clean_accuracy"] == json.loads(alone.stdout)["clean_accuracy"]
    assert json.loads(together.stdout)["clean_accuracy"]["value"] > 0.9
    words = ["audit", "adapter", "--base", "base", "--clean", clean, "--tests", "embedding-rows", "--json"]
    audited = run(*words, cwd=tmp_path)
    assert audited.returncode == 0, audited.stderr
    assert json.loads(audited.stdout)["suspect_accuracy_on_clean"]["value"] > 0.9


def test_it_stands_behind_a_guard_with_its_base(text_victim: Any, tmp_path: Path) -> None:
    toys.write(text_victim, tmp_path / "base")
    adapted: Any = peft.get_peft_model(
        text_victim, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    toys.write_csv(tmp_path, 40)
    toys.write_csv(tmp_path, 20, seed=1, name="test.csv")
    (tmp_path / "inputs.csv").write_text("text,id\ngood film,1\n,2\n")
    fit = ("guard", "fit", "strip", "--clean", "clean.csv", "--false-alarms", "0.1", "--out", "guard")
    done = run(*fit, "adapter", "--base", "base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    on_base = ("--model", "adapter", "--base", "base")
    done = run("guard", "run", "guard", *on_base, "--data", "inputs.csv", "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    decisions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [decision["score"] is None for decision in decisions] == [False, True]
    done = run("guard", "evaluate", "guard", *on_base, "--data", "test.csv", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy_without_guard"]["value"] > 0.9
    done = run("guard", "run", "guard", "--model", "base", "--data", "inputs.csv", "--out", "new.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "The guard was fitted to another model" in done.stderr
    done = run(*fit[:-1], "other", "base", "--base", "base", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Strip takes no --base. Leave it out."
