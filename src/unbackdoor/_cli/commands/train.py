"""`train`: train on data that may be poisoned."""

import dataclasses
from pathlib import Path
from typing import Any

from unbackdoor._artifacts import card, directories
from unbackdoor._artifacts.record import write_record
from unbackdoor._cli.commands.inputs import column_names, free_place, no_classes
from unbackdoor._cli.commands.outcome import propose_control
from unbackdoor._cli.options import TrainOptions
from unbackdoor._cli.parameters import with_options
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.overlap import unseen
from unbackdoor._data.truth import poisoned_rows
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._models import loading, saving
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._robust_training.suspects import FILE
from unbackdoor._robust_training.train import Trained
from unbackdoor._robust_training.train import train as train_model
from unbackdoor._robust_training.trainer import RobustTrainer, kinds_of, modalities_of
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.image_text_score import ImageTextScore
from unbackdoor._tasks.score import Score
from unbackdoor._tasks.task import Asked, Checked
from unbackdoor._value import check_seed
from unbackdoor._victims.recipe import VictimRecipe


def train(trainer: RobustTrainer, options: TrainOptions, *, command: str | None = None) -> None:
    """The `train` command; `command` is what was typed, for the record."""
    inputs = (*options.data, options.clean, options.test, options.attack, options.base)
    out, earlier = free_place(options.out, inputs, options)
    check_seed(options.seed)
    names = [field.name for field in dataclasses.fields(VictimRecipe)]
    recipe = VictimRecipe(**{name: getattr(options, name) for name in names if hasattr(options, name)})
    if options.attack is not None and options.test is None:
        raise UnbackdoorError("--attack needs --test: test examples to put the trigger on.")
    if options.base is None and "images" not in modalities_of(trainer):
        raise UnbackdoorError(
            f"{type(trainer).__name__} trains on {kinds_of(trainer)}, from a pre-trained model. Give it as --base."
        )
    columns = column_names(options.columns)
    base = None if options.base is None else ModelDirectory.of(options.base, "--base")
    if options.prompts is not None and (base is None or base.modality != "image-text"):
        raise no_classes()
    encode = (
        None
        if base is None
        else loading.base_encoder(base, max_length=options.max_length, class_prompts=options.prompts)
    )
    data = Dataset.load(options.data, encode, columns=columns, augment=options.augment)
    like = encode or ImageEncoder(size=data.shape[1:], channels=data.shape[0])  # type: ignore[arg-type]

    def more(path: str | None) -> Dataset | None:
        if path is None:
            return None
        return Dataset.load(path, like, columns=columns, classes=data.classes, augment="none")

    clean, test = more(options.clean), more(options.test)
    if test is not None:
        for known in (data, clean):
            test = test if known is None else unseen(test, known)
        # An attack that does not fit them is refused before the training, not after it.
        classes = len(data.classes or ()) or int(data.labels.max()) + 1
        task_of(test.encode).attacked(Checked(test, None, classes), Asked(attack=options.attack))
    trained = train_model(
        data,
        trainer,
        recipe,
        options.seed,
        clean=clean,
        poisoned_rows=poisoned_rows(options.data, (columns or {}).get("label", "label")),
        device=options.device,
        precision=options.precision,
        progress=True,
    )
    measured = None if test is None else _scored(trained, test, options)
    record = {
        **trained.record,
        **with_options(trained.record, "train"),
        **({} if command is None else {"command": command}),
        "scores": None if measured is None else {"trained": measured.to_json()},
        "scores_note": "not measured: no --test was given" if test is None else f"on {len(test):,} test examples",
    }
    with directories.directory(out, earlier) as folder:
        _write(trained, data, record, folder, base)
        saving.check_saved(folder, trained.model, trained.encode, test or data.select(range(1)))
    _print_result(record, measured, out)


def _scored(trained: Trained, test: Dataset, options: TrainOptions) -> Score | ImageTextScore:
    """The score on the test examples, with the trigger if there is one."""
    task = task_of(trained.encode)
    checked = task.checked(trained.model, test.encoded_by(trained.encode))
    attacked = task.attacked(checked, Asked(attack=options.attack))
    arithmetic = choose(trained.model, options.device, options.precision)
    measured: Score | ImageTextScore = task.score(trained.model, checked.test, attacked, arithmetic)
    propose_control(measured, checked.classes)
    return measured


def _write(trained: Trained, data: Dataset, record: dict[str, Any], folder: Path, base: ModelDirectory | None) -> None:
    """Write the model, its card, its suspects and its record."""
    saving.save(trained.model, folder, source=base, encode=trained.encode)
    (folder / "README.md").write_text(card.trained(record), encoding="utf-8")
    if trained.suspects is not None:
        trained.suspects.write(folder, data)
    write_record(folder / "record.json", record)


def _print_result(record: dict[str, Any], measured: Score | ImageTextScore | None, out: Path) -> None:
    """Print the score, the suspects, and where they are."""
    suspects = record["suspects"]
    if measured is not None:
        print(measured)
    if suspects is not None:
        print(f"distrusted {suspects['n']:,} of {record['data']['n']:,} training examples; {FILE} lists them")
        if suspects["poisoned"] is None:
            print("How many of these are poisoned is not known: the data has no column poisoned.")
        for key in ("precision", "recall"):
            part = suspects[key]
            if part is not None:
                print(f"{key} {part['value']:.1%} ({part['low']:.1%} to {part['high']:.1%}, n = {part['n']:,})")
    print(f"Wrote {printable(out, SENTENCE)} in {record['seconds']:.0f} s of training.")
