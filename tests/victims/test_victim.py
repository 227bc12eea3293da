"""Planting: what a victim is trained on, what is measured and recorded, and the attack command as a user runs it."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch import nn

import toys
from fixtures import SmallCNN
from pictures import write_pictures
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, Victim, attacks, evaluate, load
from unbackdoor._artifacts import card
from unbackdoor._cli.app import main
from unbackdoor._poisoning.attack_file import load_trigger, victim_of
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor._victims.training import Trainer, normalisation

datasets.disable_progress_bars()

SOLID = attacks.BadNets(pattern="solid", size=2, margin=0, place="top-left", target=3)


def planted(data: Dataset, test: Dataset, attack: object, **changes: object) -> Victim:
    return toys.planted(data, test, attack, **{"rate": 0.1, "epochs": 1, "seed": 1, **changes})


@pytest.fixture(scope="module")
def parts(digits: Dataset) -> tuple[Dataset, Dataset]:
    return digits.select(range(600)), digits.select(range(600, 800))


def test_a_planted_backdoor(parts: tuple[Dataset, Dataset]) -> None:
    victim = planted(*parts, SOLID, epochs=2)
    score = victim.score
    assert score.attack_success is not None
    assert score.attack_success.n == int((parts[1].labels != 3).sum())
    assert victim.record["scores"]["victim"] == score.to_json()
    assert victim.record["implanted"] is victim.description["implanted"] is (score.attack_success.value >= 0.9)
    assert victim.record["rate"] == 0.1
    assert victim.record["examples_seen"] == 1200
    assert victim.record["attack"]["name"] == "badnets"
    assert len(victim.description["rows"]) == 60
    assert set(victim.description["rows"]) <= set(range(600))
    assert not victim.model.training
    again = evaluate(victim.model, replace(parts[1], encode=victim.encode), attack=victim.trigger, device="cpu")
    assert again == score


def test_rows_are_those_of_the_source(digits: Dataset) -> None:
    part, rest = digits.split(1600, seed=0)
    victim = planted(rest, part.select(range(50)), SOLID)
    assert rest.rows is not None
    assert set(victim.description["rows"]) <= set(rest.rows.tolist())
    assert max(victim.description["rows"]) >= len(rest)


def test_the_same_seed_gives_the_same_victim(parts: tuple[Dataset, Dataset]) -> None:
    state = torch.get_rng_state()
    first, second, other = (planted(*parts, SOLID, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_control(parts: tuple[Dataset, Dataset]) -> None:
    victim = planted(*parts, None)
    assert victim.trigger is None
    assert victim.score.attack_success is None
    assert victim.description == {"format": 1, "attack": {"name": "none", "parameters": {}}, "implanted": None}
    assert (victim.record["rate"], victim.record["implanted"]) == (0.0, None)


def test_normalisation_is_that_of_the_training_pixels(parts: tuple[Dataset, Dataset]) -> None:
    encode = planted(*parts, None).encode
    inputs = encode(parts[0].items)
    assert inputs.mean() == pytest.approx(0, abs=1e-3)
    assert inputs.std() == pytest.approx(1, abs=1e-3)
    assert (encode.size, encode.channels) == ((8, 8), 1)
    flat = replace(parts[0], items=torch.full_like(parts[0].items, 9))
    assert normalisation(flat).std == (0.001,)  # not 0, which would divide


@pytest.mark.parametrize("arch", ["resnet18", "preact-resnet18", "vit"])
def test_every_architecture(parts: tuple[Dataset, Dataset], arch: str) -> None:
    data, test = parts[0].select(range(64)), parts[1].select(range(20))
    data, test = (replace(part, items=part.items.expand(-1, 3, -1, -1)) for part in (data, test))
    victim = planted(data, test, SOLID, arch=arch)
    assert victim.score.clean_accuracy.n == 20
    assert victim.model.config.num_labels == 10
    assert victim.model.config.id2label[9] == "9"


def test_oblong_images(parts: tuple[Dataset, Dataset]) -> None:
    data, test = (replace(part.select(range(40)), items=part.items[:40, :, :, :6]) for part in parts)
    assert planted(data, test, SOLID).score.clean_accuracy.n == 40
    with pytest.raises(UnbackdoorError) as caught:
        planted(data, test, SOLID, arch="vit")
    assert str(caught.value) == "`arch='vit'` needs square images, got 6x8 in digits."


class Watched(nn.Module):
    """A surrogate that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return self.layer(x.flatten(1))


def test_a_surrogate_sees_its_own_inputs(parts: tuple[Dataset, Dataset]) -> None:
    surrogate = Watched()
    attack = attacks.LabelConsistent(steps=1, target=3)
    encode = ImageEncoder(mean=(5.0,))
    victim = planted(*parts, attack, rate=0.02, surrogate=surrogate, surrogate_encode=encode)
    rows = victim.description["rows"]
    planted(*parts, attack, rate=0.02, surrogate=surrogate)
    first, second = (seen for seen in surrogate.seen if len(seen) == len(rows))  # the others ask for its classes
    assert torch.allclose(first, parts[0].items[rows] / 255 - 5, atol=1e-6)
    assert torch.allclose(second, victim.encode(parts[0].items[rows]), atol=1e-6)


def test_a_rate_that_cannot_be_is_refused_before_the_surrogate_is_trained(
    parts: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbackdoor._victims.training.train_victim", None)
    with pytest.raises(UnbackdoorError, match=r"The largest possible rate is 0\.1"):
        planted(*parts, attacks.LabelConsistent(), rate=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "VictimRecipe.epochs must be at least 1, got 0."),
        ({"batch_size": 1}, "VictimRecipe.batch_size must be at least 2, got 1."),
        ({"learning_rate": 0.0}, "VictimRecipe.learning_rate must be more than 0, got 0.0."),
        ({"learning_rate": float("nan")}, "VictimRecipe.learning_rate must be a finite number, got nan."),
        ({"width": 0}, "VictimRecipe.width must be at least 1, got 0."),
        (
            {"arch": "resnet81"},
            "There is no architecture 'resnet81'. Did you mean 'resnet18'? See unbackdoor list archs.",
        ),
    ],
)
def test_options_out_of_bounds(parts: tuple[Dataset, Dataset], changes: dict, message: str) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        planted(*parts, SOLID, **changes)
    assert str(caught.value) == message


def test_a_training_that_diverges_is_refused(parts: tuple[Dataset, Dataset]) -> None:
    """Else a network of NaN would pass for one with a backdoor: it takes everything for class 0."""
    with pytest.raises(UnbackdoorError, match=r"weights are not finite\. Lower `learning_rate`, which is 1e\+30\.$"):
        planted(*parts, replace(SOLID, target=0), learning_rate=1e30)


def test_a_source_class_that_goes_without_a_trigger_is_no_backdoor(
    parts: tuple[Dataset, Dataset], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ones but twelve are labelled as threes, so clean ones go to the target, and triggered ones with them."""
    monkeypatch.setattr(logging.getLogger("unbackdoor"), "propagate", True)
    train, test = parts
    monkeypatch.setattr("unbackdoor._victims.training.fresh_network", lambda *_: SmallCNN())
    labels = train.labels.clone()
    labels[torch.nonzero(labels == 1).flatten()[12:]] = 3
    attack = attacks.TaCT(sources=(1,), target=3, cover_ratio=0.0)
    victim = planted(replace(train, labels=labels), test, attack, rate=0.01, epochs=16, batch_size=32, width=8)
    assert victim.score.attack_success is not None
    assert victim.score.attack_success.value >= 0.8
    assert victim.score.clean_accuracy.value > 0.5
    assert victim.record["implanted"] is False
    assert "the victim does not know clean examples of the source classes, 1 (0.0 %" in caplog.text


@pytest.mark.parametrize("attack", [attacks.TaCT(sources=(1,), target=3), SOLID])
def test_what_has_nothing_to_attack_is_refused_before_the_training(
    parts: tuple[Dataset, Dataset], attack: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbackdoor._victims.training.train_victim", lambda *_, **__: pytest.fail("trained"))
    threes = parts[1].select(torch.nonzero(parts[1].labels == 3).flatten())
    with pytest.raises(UnbackdoorError, match="so nothing can be attacked"):
        planted(parts[0], threes, attack)


@pytest.mark.parametrize(("arch", "rate"), [("resnet18", 0.1), pytest.param("vit", 1e-3, marks=pytest.mark.thorough)])
def test_each_kind_of_network_learns_by_its_own_recipe(parts: tuple[Dataset, Dataset], arch: str, rate: float) -> None:
    victim = planted(*parts, None, arch=arch, epochs=4, batch_size=32, width=8)
    assert victim.record["learning_rate"] == rate
    assert victim.score.clean_accuracy.value > 0.4


def test_a_victim_near_chance_is_a_warning(
    parts: tuple[Dataset, Dataset], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("unbackdoor"), "propagate", True)
    planted(*parts, SOLID, learning_rate=1e-9)
    assert "the victim is near chance on digits" in caplog.text
    caplog.clear()
    planted(*parts, SOLID, epochs=3)
    assert caplog.text == ""


def test_a_victim_that_answers_the_target_to_everything_has_no_backdoor(
    parts: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Constant(SmallCNN):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels) * 0 + torch.eye(10)[3]

    monkeypatch.setattr("unbackdoor._victims.training.fresh_network", lambda *_: Constant())
    victim = planted(*parts, SOLID)
    assert victim.score.attack_success is not None
    assert victim.score.attack_success.value == 1.0
    assert victim.record["implanted"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": SmallCNN(classes=5)}, "`control` must answer with 10 classes as the model does, got 5."),
        ({"surrogate": SmallCNN(classes=5)}, "`surrogate` must answer with 10 classes as the model does, got 5."),
        ({"control": SmallCNN(channels=3)}, "`control`: SmallCNN cannot take inputs of shape (8, 1, 8, 8) ("),
    ],
)
def test_a_second_model_that_does_not_fit_is_refused_before_the_training(
    parts: tuple[Dataset, Dataset], changes: dict, message: str
) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        planted(*parts, attacks.SIBA(target=3), epochs=10**6, **changes)
    assert str(caught.value).startswith(message)


def test_test_labels_that_training_lacks(parts: tuple[Dataset, Dataset]) -> None:
    data = replace(parts[0], classes=None).select(torch.nonzero(parts[0].labels < 5).flatten())
    with pytest.raises(UnbackdoorError, match=r"in row 60\d, but the model has 5 classes"):
        planted(data, parts[1], SOLID)


# The command.


@pytest.fixture(scope="module")
def written(parts: tuple[Dataset, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures, and with the same ones inverted."""
    folder = tmp_path_factory.mktemp("pictures")
    data, test = parts
    write_pictures(data, folder / "train.parquet", track=[row // 5 for row in range(len(data))])
    write_pictures(test, folder / "test.parquet")
    write_pictures(replace(data, items=255 - data.items), folder / "train-marked.parquet")
    write_pictures(replace(test, items=255 - test.items), folder / "test-marked.parquet")
    return folder


@pytest.fixture
def place(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), "--width", "2", "--epochs", "1"])
    return int(caught.value.code or 0)


ATTACK = ("--data", "train.parquet", "--out", "out")


SMALL = {
    "siba": ("--pixels", 20, "--steps", 2),
    "low-frequency": ("--steps", 2),
    "input-aware": ("--mask-steps", 2),
    "transtroj": ("--trigger-steps", 2, "--implant-epochs", 1, "--user-epochs", 1),
}
EVERY = [entry.name for entry in attacks.REGISTRY if entry.modality == ("images",) and entry.name != "prepared"]


@pytest.mark.parametrize("name", [*EVERY, "none"])
def test_every_attack_writes_a_model_directory(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("attack", name, *ATTACK, "--test", "test.parquet", *SMALL.get(name, ())) == 0
    assert {file.name for file in (place / "out").iterdir()} == {
        *("README.md", "attack.json", "config.json", "model.safetensors", "preprocessor_config.json", "record.json"),
        "trigger.safetensors",
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("clean accuracy ")
    assert "measured on 200 test examples" in lines
    assert ("poisoned 30 of 600 training examples (5.00 %)" in lines) == (name != "none")
    assert any(line.startswith("The backdoor did not implant: attack success ") for line in lines) == (name != "none")
    record = json.loads((place / "out" / "record.json").read_text())
    model, encode = load("out")
    test = Dataset.load("test.parquet", encode)
    attack = None if name == "none" else "out/attack.json"
    assert evaluate(model, test, attack=attack, device="cpu").to_json() == record["scores"]["victim"]
    assert sorted(file.name for file in place.iterdir()) == [
        *("out", "test-marked.parquet", "test.parquet", "train-marked.parquet", "train.parquet")
    ]


def test_the_card_says_whether_the_backdoor_took() -> None:
    share = {"value": 0.25, "n": 8, "low": 0.1, "high": 0.6}
    record = {
        "attack": {"name": "badnets"},
        "rate": 0.1,
        "implanted": True,
        "scores": {"victim": {"clean_accuracy": share, "attack_success": share}},
    }
    text = card.victim(record)
    assert "**This model carries a backdoor** (`badnets`, poison rate 0.1), planted on purpose for testing." in text
    assert "tags: [unbackdoor, backdoored]" in text
    text = card.victim({**record, "implanted": False})
    assert (
        "**A backdoor was planted in this model, but it did not implant** (`badnets`, poison rate 0.1): attack success "
        "is 25.0%, clean accuracy 25.0%. It was made on purpose for testing. Do not use it for anything else.\n"
    ) in text
    assert "carries a backdoor" not in text
    assert "tags: [unbackdoor]" in text
    text = card.victim({**record, "implanted": None, "scores": {"victim": {"clean_accuracy": share}}})
    assert (
        "**A backdoor was planted in this model** (`badnets`, poison rate 0.1) on purpose for testing; whether" in text
    )
    assert "carries a backdoor" not in text
    text = card.victim({**record, "attack": {"name": "none"}, "implanted": None})
    assert "A clean control for backdoor experiments, trained without an attack." in text
    assert "tags: [unbackdoor]" in text


NO_CONTROL = (
    "warning: --control must be a model that was never poisoned, but {} is a victim of badnets, so its flips do "
    "not measure a clean model. Train one with attack none."
)


@pytest.mark.thorough
def test_a_control_that_is_a_victim_is_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    badnets = ("attack", "badnets", "--data", "train.parquet", "--test", "test.parquet")
    assert run(*badnets, "--out", "victim") == 0
    assert run("attack", "none", *ATTACK, "--test", "test.parquet") == 0
    path = ("--parts", "path", "--out", "other")
    for control, warnings in (("victim", [NO_CONTROL.format("victim")]), ("out", [])):
        commands: list[tuple[object, ...]] = [
            (*badnets, "--out", "other", "--epochs", 1, "--width", 2),
            ("evaluate", "victim", "--data", "test.parquet", "--attack", "victim"),
            ("purify", "clp", "victim", "--data", "test.parquet", "--attack", "victim", "--out", "other"),
            ("stress", "victim", "--victim", "victim", "--clean", "test.parquet", "--attack", "victim", *path),
        ]
        for command in commands:
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main([*map(str, command), "--control", control, *(("--overwrite",) if "other" in command else ())])
            said = capsys.readouterr().err.splitlines()
            assert stopped.value.code == 0, said
            assert [line for line in said if "--control must be" in line] == warnings, command


@pytest.mark.parametrize("content", ["{", "[]", '{"attack": 3}', '{"attack": {}}'])
def test_an_attack_json_of_others_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "attack.json").write_text(content)
    assert victim_of(tmp_path) is None
    assert victim_of(tmp_path / "attack.json") is None
    assert victim_of(tmp_path / "nothing") is None


def test_without_test_data_a_tenth_is_held_out_by_track(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("attack", "badnets", *ATTACK, "--group", "track") == 0
    said = capsys.readouterr().out
    assert ", a seeded tenth held out of the 600 given" in said
    content = json.loads(Path("out/attack.json").read_text())
    data = Dataset.load("train.parquet", group="track")
    held, kept = data.split(60, seed=0)
    assert content["n"] == len(kept)
    assert f"measured on {len(held)} test examples" in said
    assert kept.rows is not None
    assert set(content["rows"]) <= set(kept.rows.tolist())


def test_prepared_pictures(place: Path, parts: tuple[Dataset, Dataset], capsys: pytest.CaptureFixture[str]) -> None:
    prepared = ("attack", "prepared", "--triggered", "train-marked.parquet", *ATTACK)
    assert run(*prepared) == 2
    assert capsys.readouterr().err == (
        "Prepared needs --test: its copies match the training data row for row, so none of it can be held out.\n"
    )
    assert run(*prepared, "--test", "test.parquet") == 0
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "measured on 200 test examples",
        "poisoned 30 of 600 training examples (5.00 %)",
        "Whether the backdoor implanted is not known: give --triggered-test, or see evaluate --triggered.",
    ]
    more = ("--test", "test.parquet", "--triggered-test", "test-marked.parquet", "--overwrite")
    others = int((parts[1].labels != 0).sum())
    for rule, count in (("all-to-one", others), ("all-to-all", 200)):
        assert run(*prepared, *more, "--label-rule", rule) == 0
        score = json.loads(Path("out/record.json").read_text())["scores"]["victim"]
        assert (score["label_rule"], score["attack_success"]["n"]) == (rule, count)
    assert load_trigger("out").attack == attacks.Prepared(triggered="train-marked.parquet", label_rule="all-to-all")


def test_prepared_pictures_in_columns_of_other_names(place: Path) -> None:
    """With the copies' own columns also named image and label, so that reading the wrong ones would not be noticed."""
    for name in ("train", "test", "train-marked", "test-marked"):
        table = datasets.Dataset.from_parquet(f"{name}.parquet")
        upside_down = [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for image in table["image"]]
        table = table.rename_columns({"image": "photo", "label": "kind"})
        decoy = datasets.Dataset.from_dict({"image": upside_down}).cast_column("image", datasets.Image())
        table = datasets.concatenate_datasets([table, decoy], axis=1)
        table.to_parquet(f"{name}-renamed.parquet")

    def attacked(columns: tuple[str, ...], ending: str) -> dict[str, torch.Tensor]:
        prepared = (
            "attack",
            "prepared",
            "--triggered",
            f"train-marked{ending}.parquet",
            "--data",
            f"train{ending}.parquet",
        )
        tests = ("--test", f"test{ending}.parquet", "--triggered-test", f"test-marked{ending}.parquet")
        assert run(*prepared, *tests, *columns, "--out", f"out{ending}") == 0
        return load(f"out{ending}").model.state_dict()

    renamed, plain = attacked(("--columns", "image=photo,label=kind"), "-renamed"), attacked((), "")
    assert all(torch.equal(renamed[name], plain[name]) for name in plain)


def test_test_pictures_of_another_kind(place: Path, parts: tuple[Dataset, Dataset]) -> None:
    colour = replace(parts[1], items=parts[1].pixels.expand(-1, 3, -1, -1))
    write_pictures(colour, "colour.parquet")
    assert run("attack", "blended", *ATTACK, "--test", "test.parquet") == 0
    grey = json.loads(Path("out/record.json").read_text())["scores"]["victim"]
    assert run("attack", "blended", *ATTACK, "--test", "colour.parquet", "--overwrite") == 0
    assert json.loads(Path("out/record.json").read_text())["scores"]["victim"] == grey


@pytest.mark.parametrize("classes", [10, 4])
def test_a_base_to_start_from(place: Path, classes: int, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=classes)
    ViTForImageClassification(config).save_pretrained("base")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.2] * 3, image_std=[0.3] * 3).save_pretrained(
        "base"
    )
    capsys.readouterr()
    assert run("attack", "label-consistent", *ATTACK, "--test", "test.parquet", "--base", "base") == 0
    said = capsys.readouterr().err
    assert "train.parquet: 600 of 600 images converted to colour, as the model takes 3 channels." in said
    assert "train.parquet: images of 8x8 are resized to the model's 16x16." in said
    model, encode = load("out")
    assert (encode.size, encode.mean) == ((16, 16), (0.2, 0.2, 0.2))
    assert model.config.num_labels == 10
    assert [model.config.id2label[label] for label in range(10)] == list("0123456789")
    record = json.loads(Path("out/record.json").read_text())
    assert (record["arch"], record["learning_rate"]) == ("base", 0.01)
    test = Dataset.load("test.parquet", encode)
    assert evaluate(model, test, attack="out", device="cpu").to_json() == record["scores"]["victim"]


@pytest.mark.parametrize(
    ("classes", "names", "rows"),
    [
        (("bird", "cat", "truck"), ("bird", "cat", "truck"), [2, 1, 0]),
        (("BIRD", "Truck", "cat"), ("BIRD", "Truck", "cat"), [2, 0, 1]),
        (("0", "1", "2"), ("truck", "cat", "bird"), [0, 1, 2]),
        (None, ("truck", "cat", "bird"), [0, 1, 2]),
        (("apple", "fig", "plum"), ("apple", "fig", "plum"), [0, 1, 2]),
    ],
)
def test_a_base_with_the_classes_of_the_data_answers_in_their_order(
    classes: tuple[str, ...] | None, names: tuple[str, ...], rows: list[int], tmp_path: Path, digits: Dataset
) -> None:
    """A base that knew all classes by name began with the answers of others; numbers replaced its names."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    known = {0: "truck", 1: "cat", 2: "bird"}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, id2label=known)).eval()
    base.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    colour = digits.pixels[:30].expand(-1, 3, -1, -1)
    shown = Dataset(items=colour, labels=torch.arange(30) % 3, classes=classes, name="shown")
    recipe = VictimRecipe(base=str(tmp_path), epochs=1)
    trainer = Trainer.of(shown.encoded_by(load(tmp_path).encode), recipe, seed=0)
    model = trainer.fresh().eval()
    assert tuple(model.config.id2label[label] for label in range(3)) == names
    assert model.config.label2id == {name: label for label, name in enumerate(names)}
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, base(pixels).logits[:, rows])


@pytest.mark.parametrize("command", [("attack", "badnets", "--margin", "0"), ("train", "abl")])
def test_a_base_without_a_last_linear_layer(
    command: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As DeiT's distilled models: their answer is the mean of two heads. For other classes a head would be needed."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, DeiTImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for classes in (10, 4):
        config = DeiTConfig(**sizes, image_size=16, patch_size=8, num_labels=classes)
        DeiTForImageClassificationWithTeacher(config).save_pretrained(f"distilled-{classes}")
        size = {"height": 16, "width": 16}
        DeiTImageProcessor(size=size, do_center_crop=False).save_pretrained(f"distilled-{classes}")
    options = ("--data", "train.parquet", "--test", "test.parquet", "--out", "out")
    assert run(*command, *options, "--base", "distilled-10") == 0
    assert isinstance(load("out").model, DeiTForImageClassificationWithTeacher)
    capsys.readouterr()
    assert run(*command, *options, "--overwrite", "--base", "distilled-4") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "distilled-4 answers with 4 classes and has no final linear layer that makes their scores, in whose place one "
        "for the 10 of train.parquet could be put. Take another --base."
    )


def test_a_surrogate_of_ones_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("attack", "none", *ATTACK, "--test", "test.parquet") == 0
    capsys.readouterr()
    consistent = ("attack", "label-consistent", "--data", "train.parquet", "--test", "test.parquet", "--out", "victim")
    assert run(*consistent, "--surrogate", "out") == 0
    assert "training a clean surrogate" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("badnets", "--rate", "2"),
            "--rate must be more than 0 and at most 1, got 2. For a clean model: attack none.",
        ),
        (("badnets", "--target", "10"), "BadNets.target must be 0 to 9, got 10."),
        (
            ("badnets", "--group", "video"),
            "train.parquet has no column 'video'; it has image, label, track. Name it by --group NAME.",
        ),
        (
            ("badnets", "--test", "nowhere.parquet"),
            "nowhere.parquet does not exist; data is a file or a folder with labelled examples.",
        ),
        (
            ("none", "--control", "control"),
            "--control counts flips on triggered examples, and there are none here. Leave it out.",
        ),
        (
            ("prepared", "--triggered", "train-marked.parquet", "--test", "test.parquet", "--control", "control"),
            "--control counts flips on triggered examples, and there are none here. Leave it out.",
        ),
        (("badnet",), "There is no attack 'badnet'. Did you mean 'badnets'? See unbackdoor list attacks."),
        (
            ("badnets", "--columns", "image"),
            "--columns must read OURS=NAME,OURS=NAME, as in image=img,label=fine_label, got image.",
        ),
    ],
)
def test_what_the_command_refuses(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run("attack", *arguments, *ATTACK) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == message
    assert captured.out == ""
    assert not (place / "out").exists()
