"""The runner of trainers: checks, truth, suspects, records; and the `train` command as a user runs it."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import nn

import toys
from commands import Refusals, run
from pictures import write_pictures
from unbackdoor import Dataset, UnbackdoorError, VictimRecipe, attacks, evaluate, load, poison, train, trainers
from unbackdoor._artifacts.record import TrainingRecord, read_record
from unbackdoor._cli.commands.train import _print_result
from unbackdoor._data.truth import poisoned_rows
from unbackdoor._robust_training.suspects import Suspects
from unbackdoor._value import value
from unbackdoor._victims.training import Trainer

SOLID = attacks.BadNets(pattern="solid", size=2, margin=0, place="top-left", target=3)
SMALL = VictimRecipe(width=2, epochs=1)


@value
class Distrusting:
    """Distrusts three rows and trains on nothing."""

    def __call__(self, data: Dataset, model: nn.Module, run) -> nn.Module:
        run.distrust(torch.tensor([4, 1, 7]), torch.tensor([0.5, 2.0, 1.0]), "a number")
        return model


def trained(data: Dataset, trainer: object, **options: object):
    return train(data, trainer, SMALL, device="cpu", precision="fp32", **options)


def test_precision_and_recall() -> None:
    suspects = Suspects(torch.tensor([1, 4, 7]), torch.tensor([2.0, 0.5, 1.0]), "a number")
    precision, recall = suspects.precision_and_recall(torch.tensor([4, 7, 8, 9, 10]))
    assert (precision.count, precision.n, recall.count, recall.n) == (2, 3, 2, 5)
    assert suspects.precision_and_recall(torch.tensor([], dtype=torch.int64))[1] is None
    nothing = Suspects(torch.tensor([], dtype=torch.int64), torch.tensor([]), "a number")
    assert nothing.precision_and_recall(torch.tensor([4]))[0] is None


def test_a_trainer_does_not_see_which_rows_are_poisoned(digits: Dataset) -> None:
    """With and without the truth it makes the same model and distrusts the same rows; only the record differs."""
    data = digits.select(range(40))
    known, unknown = trained(data, Distrusting(), poisoned_rows=torch.tensor([4, 5])), trained(data, Distrusting())
    assert torch.equal(known.suspects.rows, unknown.suspects.rows)
    first, second = known.model.state_dict(), unknown.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    about = known.record["suspects"]
    assert (about["n"], about["poisoned"], about["precision"]["n"], about["recall"]["n"]) == (3, 2, 3, 2)
    assert (about["precision"]["value"], about["recall"]["value"]) == (1 / 3, 1 / 2)
    assert unknown.record["suspects"] == {**about, "poisoned": None, "precision": None, "recall": None}


def test_the_truth_may_be_a_list_or_a_mask_and_counts_each_row_once(digits: Dataset) -> None:
    data = digits.select(range(40))
    mask = [row in (4, 5) for row in range(40)]
    expected = trained(data, Distrusting(), poisoned_rows=torch.tensor([4, 5])).record["suspects"]
    for truth in ([4, 5], [5, 4, 4], np.array([4, 5]), mask, torch.tensor(mask)):
        assert trained(data, Distrusting(), poisoned_rows=truth).record["suspects"] == expected


def test_suspects_are_counted_in_the_data_as_it_was_read(digits: Dataset, tmp_path: Path) -> None:
    data = digits.select(range(100, 140))
    trained(data, Distrusting()).suspects.write(tmp_path, data)
    table = pq.read_table(tmp_path / "suspects.parquet").to_pydict()
    labels = digits.labels[[101, 107, 104]].tolist()
    assert table == {"row": [101, 107, 104], "label": labels, "class": [*map(str, labels)], "score": [2.0, 1.0, 0.5]}


def test_plain_training_is_that_of_victims(digits: Dataset) -> None:
    poisoned = poison(digits.select(range(80)), SOLID, rate=0.1, seed=4, classes=10).data
    model = train(poisoned, trainers.Plain(), SMALL, 4, device="cpu", precision="fp32").model
    victims = Trainer.of(poisoned, SMALL, seed=4, device="cpu", precision="fp32")
    expected = victims.train(victims.fresh(), victims.data).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("trainer", "options", "said"),
    [
        (trainers.Plain, {}, "train takes a trainer's value, got the class Plain. Write Plain()."),
        ("abl", {}, "train takes a trainer's value, got 'abl'. Take one of unbackdoor.trainers."),
        (
            trainers.Plain(),
            {"poisoned_rows": torch.tensor([3, 40])},
            "`poisoned_rows` must be positions 0 to 39 of digits, got 3 to 40. Give those of this data.",
        ),
        (
            trainers.Plain(),
            {"poisoned_rows": [True, False]},
            "`poisoned_rows` must have an entry for each of the 40 rows of digits if it is a mask, got one of shape "
            "(2,). Give the one of this data.",
        ),
        (trainers.Plain(), {"seed": -1}, "`seed` must be a whole number, at least 0 and less than 2**63, got -1."),
    ],
)
def test_wrong_arguments(trainer: object, options: dict, said: str, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        trained(digits.select(range(40)), trainer, **options)
    assert str(caught.value) == said


def test_data_that_does_not_fit(digits: Dataset, reviews: Dataset) -> None:
    @value
    class Reading(Distrusting):
        """The same for texts, with clean ones."""

        modality = ("text",)
        needs_clean = True

    zeros = digits.select(torch.nonzero(digits.labels == 0).flatten())
    with pytest.raises(UnbackdoorError) as caught:
        trained(zeros, trainers.Plain())
    assert str(caught.value) == (
        "digits holds one class only (0); a classifier is trained on two classes at least. Add others."
    )
    with pytest.raises(UnbackdoorError) as caught:
        trained(digits, Reading())
    assert str(caught.value) == "Reading trains on texts, but digits holds other data. Try abl."
    with pytest.raises(UnbackdoorError) as caught:
        trained(reviews, Reading())
    assert str(caught.value) == "Reading needs `clean`: some labelled examples without poison."
    with pytest.raises(UnbackdoorError) as caught:
        trained(digits, Distrusting(), clean=digits)
    assert str(caught.value) == "Distrusting uses no clean examples. Leave `clean` out."
    alone = reviews.select(torch.nonzero(reviews.labels == 1).flatten())
    with pytest.raises(UnbackdoorError, match=r"^`clean` must have examples of two classes at least, and reviews has "):
        trained(reviews, Reading(), clean=alone)
    with pytest.raises(UnbackdoorError, match="A text victim needs `base`"):
        trained(reviews, trainers.Plain())


def test_a_base_whose_logits_no_linear_layer_makes(reviews: Dataset, tmp_path: Path) -> None:
    """EuroBERT takes the mean over the tokens behind its last layer: only a trainer that needs that layer refuses."""
    sizes = {"vocab_size": len(toys.tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.EuroBertConfig(**sizes, num_attention_heads=2, pad_token_id=0, max_position_embeddings=34)
    transformers.EuroBertForSequenceClassification(config).save_pretrained(tmp_path)
    toys.tokenizer(types=False).save_pretrained(tmp_path)
    recipe = VictimRecipe(base=str(tmp_path), epochs=1, batch_size=16)
    data = reviews.select(range(32)).encoded_by(load(tmp_path).encode)
    assert train(data, trainers.Plain(), recipe, device="cpu").record["accuracy_on_data"]["n"] == 32
    with pytest.raises(UnbackdoorError) as caught:
        train(data, trainers.DPoE(blocks=1), recipe, device="cpu")
    assert str(caught.value) == (
        "EuroBertForSequenceClassification has no final linear layer that makes its logits, which this trainer needs. "
        "Take abl, or another base."
    )


# The command.


@pytest.fixture(scope="module")
def place(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a poisoned set whose poisoned rows are known, as `attack` writes it, and clean test examples."""
    folder = tmp_path_factory.mktemp("train")
    write_pictures(digits.select(range(400)), folder / "train.parquet")
    write_pictures(digits.select(range(400, 500)), folder / "test.parquet")
    write_pictures(digits.select(torch.nonzero(digits.labels == 0).flatten()), folder / "zeros.parquet")
    done = run(
        *("attack", "badnets", "--data", "train.parquet", "--test", "test.parquet", "--out", "victim", "--rate", "0.1"),
        *("--width", "2", "--epochs", "1", "--save-data"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_poisoned_set_that_attack_writes(place: Path, digits: Dataset) -> None:
    rows = poisoned_rows(place / "victim" / "poisoned.parquet")
    description = json.loads((place / "victim" / "attack.json").read_text())
    assert rows.tolist() == description["rows"]
    assert len(rows) == 40
    data, clean = Dataset.load(place / "victim" / "poisoned.parquet"), Dataset.load(place / "train.parquet")
    assert data.classes == clean.classes
    changed = [row for row in range(400) if not torch.equal(data.pixels[row], clean.pixels[row])]
    assert changed == rows.tolist()
    assert (data.labels[rows] == description["target"]).all()
    assert poisoned_rows(place / "train.parquet") is None


def test_train_writes_a_model_that_the_other_commands_take(place: Path) -> None:
    done = run(
        *("train", "abl", "--data", "victim/poisoned.parquet", "--test", "test.parquet"),
        *(
            "--attack",
            "victim/attack.json",
            "--out",
            "made",
            "--width",
            "2",
            "--epochs",
            "1",
            "--isolation-epochs",
            "1",
        ),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    folder = place / "made"
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "record.json"),
        "suspects.parquet",
    }
    record = json.loads((folder / "record.json").read_text())
    schema = json.loads((Path(__file__).parents[2] / "docs/schemas/record-of-train.schema.json").read_text())
    jsonschema.validate(record, schema)
    assert isinstance(read_record(folder / "record.json"), TrainingRecord)
    assert record["command"].startswith("unbackdoor train abl --data victim/poisoned.parquet")
    assert record["suspects"]["n"] == pq.read_table(folder / "suspects.parquet").num_rows == 4
    assert record["suspects"]["poisoned"] == record["suspects"]["recall"]["n"] == 40
    assert "distrusted 4 of 400 training examples; suspects.parquet lists them\nprecision " in done.stdout
    model, encode = load(folder)
    score = evaluate(
        model, Dataset.load(place / "test.parquet", encode), attack=place / "victim" / "attack.json", device="cpu"
    )
    assert score.to_json() == record["scores"]["trained"]
    again = run(
        "purify", "fine-tuning", "made", "--clean", "test.parquet", "--epochs", "1", "--out", "tuned", cwd=place
    )
    assert (place / "tuned" / "record.json").exists(), again.stderr
    assert not (place / "tuned" / "suspects.parquet").exists()


def test_without_truth_and_test_data(place: Path) -> None:
    done = run(
        *("train", "abl", "--data", "train.parquet", "--out", "bare", "--width", "2", "--epochs", "1"),
        *("--isolation-epochs", "1"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert "How many of these are poisoned is not known: the data has no column poisoned." in done.stdout
    record = json.loads((place / "bare" / "record.json").read_text())
    assert (record["scores"], record["suspects"]["precision"]) == (None, None)
    assert record["scores_note"] == "not measured: no --test was given"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("abll",), "There is no trainer 'abll'. Did you mean 'abl'? See unbackdoor list trainers."),
        (("abl", "--data", "train.parquet", "--out", "victim"), "victim exists. Use --overwrite, or another --out."),
        (("abl", "--data", "train.parquet", "--out", ""), "--out must be the name of a directory, got an empty one."),
        (
            ("plain", "--data", "none.parquet", "--out", "new"),
            "none.parquet does not exist; data is a file or a folder with labelled examples.",
        ),
        (
            ("plain", "--data", "zeros.parquet", "--out", "new"),
            "zeros.parquet holds one class only (0); a classifier is trained on two classes at least. Add others.",
        ),
        (
            ("plain", "--data", "train.parquet", "--out", "new", "--attack", "victim"),
            "--attack needs --test: test examples to put the trigger on.",
        ),
        (
            ("plain", "--data", "train.parquet", "--out", "new", "--clean", "test.parquet"),
            "Plain uses no clean examples. Leave --clean out.",
        ),
        (
            ("abl", "--data", "train.parquet", "--out", "new", "--isolated", "0.001"),
            "ABL.isolated=0.001 of 400 rows is none. Take at least 0.0025, or more data.",
        ),
        (
            ("abl", "--data", "train.parquet", "--out", "new", "--isolated", "0.5"),
            "ABL.isolated must be less than 0.5, got 0.5.",
        ),
    ],
    ids=["name", "exists", "empty", "absent", "one-class", "no-test", "clean", "no-row", "bounds"],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], said: str, refused: Refusals) -> None:
    assert refused("train", *words) == said


def test_an_attack_that_cannot_be_measured_is_refused_before_the_training(
    refused: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbackdoor._cli.commands.train.train_model", None)
    words = ("plain", "--data", "train.parquet", "--out", "new", "--test", "test.parquet", "--attack", "none.json")
    assert (
        refused("train", *words)
        == "none.json does not exist; --attack takes the attack.json that unbackdoor attack wrote."
    )


@pytest.mark.parametrize("command", [("attack", "none"), ("train", "plain")], ids=["attack", "train"])
def test_scores_on_the_training_examples_alone_have_a_warning(
    command: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    small = ("--epochs", "1", "--width", "2", "--out", tmp_path / "new")
    done = run(*command, "--data", "train.parquet", "--test", "train.parquet", *small, cwd=place)
    assert done.returncode == 0, done.stderr
    assert (
        "train.parquet holds only examples of train.parquet, on which the model is trained: its scores say nothing "
        "about others." in done.stderr
    )


def test_data_that_attack_cannot_save(refused: Refusals, place: Path, tmp_path: Path) -> None:
    arguments = ("--data", "train.parquet", "--out", "new", "--save-data")
    assert refused("attack", "none", *arguments) == (
        "--save-data writes the poisoned examples, and attack none makes none. Leave it out."
    )
    assert refused("attack", "input-aware", *arguments) == (
        "InputAware trains its victim in a way of its own, so its poisoned examples alone do not carry the attack. "
        "Leave --save-data out."
    )


def test_a_truth_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label,poisoned\na fine film,1,true\na dull film,0,perhaps\n")
    with pytest.raises(UnbackdoorError) as caught:
        poisoned_rows(tmp_path / "data.csv")
    assert str(caught.value).endswith(
        "data.csv has a column 'poisoned' that must hold true and false, got 'perhaps' in row 1. Correct it, or leave "
        "the column out."
    )
    (tmp_path / "data.csv").write_text("text,label,poisoned\na fine film,1,true\na dull film,0,0\n")
    assert poisoned_rows(tmp_path / "data.csv").tolist() == [0]


def test_no_suspects_where_the_truth_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    none = Suspects(torch.tensor([], dtype=torch.int64), torch.tensor([]), "a number")
    record = {"suspects": none.to_json(torch.tensor([4, 7])), "data": {"n": 60}, "seconds": 1.0}
    _print_result(record, None, Path("made"))
    assert capsys.readouterr().out == (
        "distrusted 0 of 60 training examples; suspects.parquet lists them\n"
        "recall 0.0% (0.0% to 65.8%, n = 2)\nWrote made in 1 s of training.\n"
    )


def test_what_is_taken_for_clean_is_not_the_data_itself(tmp_path: Path) -> None:
    base, data = toys.write(toys.classifier("bert"), tmp_path / "bert"), toys.write_csv(tmp_path, 60, name="data.csv")
    done = run(
        *("train", "musclelora", "--data", data.name, "--clean", data.name, "--base", base.name, "--out", "new"),
        *("--adapter-epochs", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "warning: data.csv holds every example of data.csv: if some are poisoned, so are those that are taken for "
        "clean. Give examples that you trust as --clean." in done.stderr
    )


def test_texts_train_from_a_base(tmp_path: Path) -> None:
    base = toys.write(toys.classifier("bert"), tmp_path / "bert")
    train_file, test_file = toys.write_csv(tmp_path, 60, name="train.csv"), toys.write_csv(tmp_path, 30, seed=1)
    done = run(
        *("train", "plain", "--data", train_file.name, "--test", test_file.name, "--base", base.name),
        *("--out", "made", "--epochs", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clean accuracy ")
    assert (tmp_path / "made" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_trained_in_whole_steps(dtype: torch.dtype, tmp_path: Path) -> None:
    """In half precision, which most bases of language models have, a small step on a weight is rounded away."""
    base = toys.classifier("bert")
    toys.write(base.to(dtype), tmp_path / "half")
    toys.write(base.float(), tmp_path / "whole")
    models = {}
    for name in ("half", "whole"):
        recipe = VictimRecipe(base=str(tmp_path / name), epochs=1, batch_size=16, learning_rate=1e-3)
        encode = load(tmp_path / name).encode
        data = Dataset(items=toys.reviews(48).texts, labels=toys.reviews(48).labels, encode=encode, name="reviews")
        models[name] = train(data, trainers.Plain(), recipe, device="cpu", precision="fp32").model
    for name, weight in models["half"].state_dict().items():
        assert torch.equal(weight, models["whole"].state_dict()[name].to(dtype)), name


def test_a_classifier_of_pictures_in_half_precision_is_a_base(digits: Dataset, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        **{"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "intermediate_size": 16, "num_labels": 10},
    )
    transformers.ViTForImageClassification(config).to(torch.bfloat16).save_pretrained(tmp_path)
    steps = transformers.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    steps.save_pretrained(tmp_path)
    data = digits.select(range(60)).encoded_by(load(tmp_path).encode)
    done = train(data, trainers.Plain(), VictimRecipe(base=str(tmp_path), epochs=1), device="cpu", precision="fp32")
    assert {parameter.dtype for parameter in done.model.parameters()} == {torch.bfloat16}
    assert done.record["accuracy_on_data"]["n"] == 60
