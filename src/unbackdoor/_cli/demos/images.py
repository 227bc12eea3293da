"""The demo: plant a backdoor, purify it in two ways, and make a page; here for digits, without a network."""

import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unbackdoor import _reports
from unbackdoor._artifacts import card, directories
from unbackdoor._artifacts.record import write_record
from unbackdoor._cli.commands.outcome import not_usable
from unbackdoor._data.augmentation import Augmentation, augmentation
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models import saving
from unbackdoor._models.arithmetic import Precision, choose
from unbackdoor._poisoning.triggered import Triggered, triggered
from unbackdoor._purification.method import Method, method_name
from unbackdoor._purification.purify import Purified, purify
from unbackdoor._tasks.classification import score
from unbackdoor._tasks.proportion import near_chance
from unbackdoor._tasks.score import Score
from unbackdoor._value import check_seed
from unbackdoor._victims.directory import write_victim
from unbackdoor._victims.plant import Victim, plant
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor.attacks.badnets import BadNets
from unbackdoor.purifiers.fine_tuning import FineTuning
from unbackdoor.purifiers.fst import FST

TRAINING, CLEAN = 1000, 300  # of the 1,797 digits; the rest is scored on
BORDER = 2  # blank pixels around the 8x8 digits, so that the patch hides none of a digit

ATTACK = BadNets(size=3, margin=0, target=0)
RATE = 0.02

# The same budget for both. Over seeds 0 to 4 attack success is 94 to 100 % after fine-tuning and 0 % after FST, at a
# cost of at most 1.4 points of clean accuracy.
EPOCHS = 20
METHODS: tuple[Method, ...] = (
    FineTuning(epochs=EPOCHS, batch_size=32, learning_rate=0.02),
    FST(alpha=0.5, epochs=EPOCHS, batch_size=32, learning_rate=0.02),
)


def image(*, out: str, overwrite: bool, seed: int, epochs: int = 30) -> None:
    """The `demo image` command.

    Args:
        out: directory to write: `report.html`, `victim/`, `purified/`, `clean.parquet`, `test.parquet`, `record.json`.
        overwrite: replace an earlier demo.
        seed: of everything random, at least 0.
        epochs: of the victim's training.

    Raises:
        UnbackdoorError: `out` exists, the seed is negative, or scikit-learn is missing.
    """
    torch.set_num_threads(1)  # so small a network gains nothing from more, and loses much on a busy machine
    folder = Path(out)
    before = directories.check_free(folder, overwrite=overwrite)
    check_seed(seed)
    training, rest = digits().split(TRAINING, seed=seed)
    clean, test = rest.split(CLEAN, seed=seed)
    tell(
        f"1. Data. {len(training) + len(rest):,} real handwritten digits, which ship with scikit-learn: "
        f"{len(training):,} train the victim, {len(clean):,} clean ones purify it, {len(test):,} others score it."
    )

    # One network of this size is quickest on a processor, and float32 gives the same numbers on all of them.
    recipe = VictimRecipe(rate=RATE, width=8, epochs=epochs, batch_size=64)
    victim, control = (
        plant(training, attack, recipe, seed, test=test, device="cpu", precision="fp32", progress=True)
        for attack in (ATTACK, None)
    )
    clean = replace(clean.encoded_by(victim.encode), augment=Augmentation.none())
    test = test.encoded_by(victim.encode)
    assert victim.trigger is not None
    assert test.classes is not None
    attacked = triggered(test, victim.trigger, len(test.classes))
    poisoned = len(victim.description["rows"])
    tell(
        f"2. Attack. {poisoned} of the {len(training):,} training digits ({100 * poisoned / len(training):.0f} %) got "
        f"a {ATTACK.size}x{ATTACK.size} checkerboard in a corner and the label '{ATTACK.target}'. The victim "
        f"{health(victim.score, len(test.classes))} of the other digits it takes "
        f"{percent(victim.score, 'attack_success')} for '{ATTACK.target}' once they carry the patch."
    )

    tell(
        f"3. Purification. Both methods tune on the same {len(clean)} clean digits, {EPOCHS} times over, and know "
        "neither the trigger nor the class that the attacker wants."
    )
    story = Story(
        kind="image",
        title="A backdoor in a digit classifier, and what removes it",
        facts={
            "Data": "handwritten digits of scikit-learn, 8x8 pixels on a canvas of 12x12",
            "Attack": f"{ATTACK!r}, {poisoned} of {len(training):,} training examples",
            "Victim": f"{recipe.arch}, width {recipe.width}, {epochs} epochs",
        },
        command=f"unbackdoor demo image --seed {seed}",
        device="cpu",
        precision="fp32",
        next_method="ft-init",
    )
    told(story, folder, victim, control.model, METHODS, clean, test, attacked, seed=seed, before=before)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What one demo says that another does not.

    Args:
        kind: as in `demo image`.
        title: of the page.
        facts: for the page, as label and text.
        command: repeats the demo.
        device: where to purify and to score.
        precision: in which.
        next_method: what the farewell proposes to try.
        next_options: that it needs.
    """

    kind: str
    title: str
    facts: dict[str, str]
    command: str
    device: str | None
    precision: Precision
    next_method: str
    next_options: str = ""


def told(
    story: Story,
    folder: Path,
    victim: Victim,
    control: nn.Module,
    methods: tuple[Method, ...],
    clean: Dataset,
    test: Dataset,
    attacked: Triggered,
    *,
    seed: int,
    base: nn.Module | None = None,
    before: directories.Content | None = None,
) -> None:
    """Purify by each method, score beside a clean model put through the same, print the table and write the page."""

    def purified(model: nn.Module, method: Method) -> Purified:
        return purify(
            model, clean, method, seed=seed, device=story.device, precision=story.precision, base=base, progress=True
        )

    results = [purified(victim.model, method) for method in methods]
    controls = [control, *(purified(control, method).model for method in methods)]
    models = [victim.model, *(result.model for result in results)]
    arithmetic = choose(victim.model, story.device, story.precision)
    scores = [
        score(model, test, attacked, arithmetic, control=other) for model, other in zip(models, controls, strict=True)
    ]
    names = ["suspect", *map(method_name, methods)]
    for result in results:
        if not result.record["usable"]:
            print(result.record["warnings"][0] + "\n")
    print(_table(names, scores) + "\n")

    record = {
        "demo": story.kind,
        "attack": victim.record["attack"],
        "rate": victim.record["rate"],
        "methods": [result.record["method"] for result in results],
        "seed": seed,
        "versions": victim.record["versions"],
        "device": victim.record["device"],
        "scores": {name: part.to_json() for name, part in zip(names, scores, strict=True)},
        "notes": results[-1].record["notes"],
        "warnings": results[-1].record["warnings"],
        "usable": results[-1].record["usable"],
        "command": story.command,
    }
    page = _reports.build(
        title=story.title,
        contenders=[
            _reports.Contender(name, model, part, seconds)
            for name, model, part, seconds in zip(
                names, models, scores, [None, *(result.record["seconds"] for result in results)], strict=True
            )
        ],
        test=test,
        attacked=attacked,
        record={
            **record,
            "clean": results[-1].record["clean"],
            "facts": {
                **story.facts,
                **{method_name(method): repr(method) for method in methods},
                "Clean model": "trained by the same recipe without the attack, then put through the same method",
            },
        },
    )
    with directories.directory(folder, before) as partial:
        _write(partial, victim, results[-1], (scores[0], scores[-1]), test)
        write_parquet(partial / "clean.parquet", clean)
        write_parquet(partial / "test.parquet", test)
        (partial / "report.html").write_text(_reports.render(page), encoding="utf-8")
        write_record(partial / "record.json", record)
    print(_farewell(folder, story.next_method, story.next_options))
    if not results[-1].record["usable"]:
        raise not_usable(folder / "purified")


def digits() -> Dataset:
    """1,797 handwritten digits, grey, in the middle of a blank canvas of 12x12 pixels.

    Raises:
        UnbackdoorError: scikit-learn, which they come with, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnbackdoorError(
            "The image demo takes its digits from scikit-learn, which is not installed; get it with: "
            'pip install "unbackdoor[demo]"'
        ) from None
    raw = load_digits()
    pixels = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8)
    items = F.pad(pixels, (BORDER,) * 4)  # (1797, 1, 12, 12)
    classes = tuple(map(str, raw.target_names))
    return Dataset(
        items=items,
        labels=torch.from_numpy(raw.target).long(),
        encode=ImageEncoder(channels=1),
        classes=classes,
        augment=augmentation("crop", items.shape[1:], classes),  # never mirrored: a digit is another thing in a mirror
        name="digits",
    )


def tell(text: str) -> None:
    """Print a paragraph, with its end at once where output is a pipe: the next step takes a while."""
    print(textwrap.fill(text, 96, subsequent_indent="   ") + "\n", flush=True)


def percent(measured: Score, name: str) -> str:
    return f"{100 * getattr(measured, name).value:.1f} %"


def health(measured: Score, classes: int) -> str:
    """What the clean accuracy of a victim says of it, in the middle of a sentence."""
    accuracy = percent(measured, "clean_accuracy")
    if near_chance(measured.clean_accuracy, classes):
        return f"has not learnt its task (clean accuracy {accuracy}, near chance);"
    return f"looks healthy (clean accuracy {accuracy}), but"


def _table(names: list[str], scores: list[Score]) -> str:
    width = max(14, 2 + max(map(len, names)))
    lines = [f"   {'':24}" + "".join(f"{name:>{width}}" for name in names)]
    for key, label in (
        ("clean_accuracy", "clean accuracy"),
        ("attack_success", "attack success"),
        ("recovered_accuracy", "recovered accuracy"),
        ("clean_model_flip_rate", "clean model's flip rate"),
    ):
        lines.append(f"   {label:24}" + "".join(f"{percent(part, key):>{width}}" for part in scores))
    return "\n".join(lines)


def _write(folder: Path, victim: Victim, purified: Purified, scores: tuple[Score, Score], test: Dataset) -> None:
    """The victim's and the purified model's directories, as `attack` and `purify` write them."""
    (folder / "victim").mkdir()
    write_victim(victim, folder / "victim")
    record: dict[str, Any] = {
        **purified.record,
        "source": {"model": "victim", "factory": None},
        "scores": {"suspect": scores[0].to_json(), "purified": scores[1].to_json()},
        "scores_note": f"on {len(test):,} examples that the method never saw",
    }
    (folder / "purified").mkdir()
    saving.save(purified.model, folder / "purified", encode=victim.encode)
    (folder / "purified" / "README.md").write_text(card.purified(record), encoding="utf-8")
    write_record(folder / "purified" / "record.json", record)
    for name, model in (("victim", victim.model), ("purified", purified.model)):
        saving.check_saved(folder / name, model, victim.encode, test)


def write_parquet(path: Path, data: Dataset) -> None:
    """Grey pictures or texts, and labels, as `--clean` and `--data` take them."""
    import datasets
    from PIL import Image

    columns: dict[str, Any]
    if data.modality == "text":
        columns = dict(zip(data.texts.columns, map(list, zip(*data.texts.strings, strict=True)), strict=True))
        features = {name: datasets.Value("string") for name in columns}
    else:
        columns = {"image": [Image.fromarray(item[0].numpy()) for item in data.pixels]}
        features = {"image": datasets.Image()}
    features["label"] = datasets.ClassLabel(names=list(data.classes)) if data.classes else datasets.Value("int64")
    table = datasets.Dataset.from_dict({**columns, "label": data.labels.tolist()}, features=datasets.Features(features))
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    table.to_parquet(str(path))
    if bars:
        datasets.enable_progress_bars()


def _farewell(folder: Path, method: str = "ft-init", options: str = "") -> str:
    place = shlex.quote(str(folder))
    program = "unbackdoor"
    if shutil.which(program) is None:  # as after `make demo`, which installs into .venv
        python = Path(sys.executable)
        here = python.is_relative_to(Path.cwd())
        program = shlex.quote(str(python.relative_to(Path.cwd()) if here else python)) + " -m unbackdoor"
    return (
        f"4. Look. Open {folder / 'report.html'}\n\n"
        "To go on:\n"
        f"   {program} evaluate {place}/purified --data {place}/test.parquet --attack {place}/victim/attack.json\n"
        f"   {program} purify {method} {place}/victim {options}--clean {place}/clean.parquet "
        f"--data {place}/test.parquet --attack {place}/victim/attack.json --out {place}-{method}"
    )
