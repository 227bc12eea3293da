"""The tables of a grid file, as checked types."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool


def _as_list(entry: Any) -> Any:
    return entry if isinstance(entry, list) else [entry]


def _device(device: str | None) -> str | None:
    if device is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ValueError(f"must be cpu, cuda, mps or xpu, or one of several (cuda:1), got {device}")
    return device


def _control(control: str | bool | None) -> str | bool | None:
    if control is False:
        raise ValueError("must be a clean model, or true if model itself is one, got false")
    return control


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, le=1)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_as_list), Field(min_length=1)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(_as_list), Field(min_length=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]

Alarms = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(_as_list), Field(min_length=1)]

Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_list), Field(min_length=1)]


class GridTable(BaseModel):
    """A table whose entries are checked, and that has no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GridTask(GridTable):
    """Data and the victims that are trained on it, or an existing model.

    Args:
        train: training examples, for victims and for budgets `from = "train"`; with `triggered` and without `model`,
            those that others have poisoned already.
        test: examples to score on.
        second_test: more test examples, on which the first purification seed is also scored, separately.
        clean: examples for budgets `from = "unseen"`; without it, `held_out` of the test examples.
        held_out: how many test examples are set aside for clean budgets and never scored.
        columns: the data's own column names.
        model: an existing model directory, or a weights file with `factory`; no victim is trained.
        attack: its `attack.json`, if that is not in the directory.
        triggered: instead of `attack`, examples that carry its trigger, with their true labels; or that of `train`.
        target: the attacker's class, with `triggered`.
        control: a clean model for the same task, for an existing model; true if that model was never poisoned.
        factory: `FILE.py:FUNCTION` that makes the module of an existing model, and of its control, base and proxy.
        mean, std, image_size: how the pixels of an existing model are made, as in `purify`.
        base: the pre-trained model that victims start from, or that the existing model came from.
        proxy: another model for the same task, for methods that need it.
        reference: a second causal language model, for guards that need one.
        unlabelled: further examples, whose labels are not read, for methods that use them; they must not be scored.
        behaviour: of a language model, with `triggered`: the answer that the attacker wants, as contains:TEXT.
        arch, width, epochs, clean_epochs, learning_rate, batch_size, max_length, augment, precision: as in `attack`.
        lora_rank, adapter, template, max_new_tokens: of language models, as in `attack`.
        freeze_text: of models of images and texts, as in `attack`.
        prompts: of these, the texts that stand for the classes: a template with `{}`, or a JSON file.
    """

    train: Texts | None = None
    test: Texts
    second_test: Texts | None = None
    clean: Texts | None = None
    held_out: Annotated[int, Field(ge=0)] = 0
    columns: dict[str, str] | None = None
    model: str | None = None
    attack: str | None = None
    triggered: Texts | None = None
    target: Annotated[int | None, Field(ge=0)] = None
    behaviour: str | None = None
    control: Annotated[str | StrictBool | None, AfterValidator(_control)] = None
    factory: str | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    image_size: Annotated[int | None, Field(ge=1)] = None
    base: str | None = None
    proxy: str | None = None
    reference: str | None = None
    unlabelled: Texts | None = None
    arch: str = "resnet18"
    width: Annotated[int, Field(ge=1)] = 16
    epochs: Annotated[int | None, Field(ge=1)] = None
    clean_epochs: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None
    max_length: Annotated[int | None, Field(ge=4)] = None
    augment: Literal["auto", "flip", "crop", "none"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    lora_rank: Annotated[int | None, Field(ge=0)] = None
    adapter: StrictBool = False
    template: Literal["chat", "alpaca", "plain"] | None = None
    max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    freeze_text: StrictBool = False
    prompts: str | None = None

    @property
    def poisoned_by_others(self) -> bool:
        """Whether its training examples carry somebody else's trigger already, so that no attack is planted."""
        return self.model is None and self.triggered is not None


# What differs from the default in these is part of a victim's identity.
RECIPE = (
    "arch",
    "width",
    "epochs",
    "clean_epochs",
    "learning_rate",
    "batch_size",
    "max_length",
    "augment",
    "precision",
    "lora_rank",
    "adapter",
    "template",
    "max_new_tokens",
    "freeze_text",
)
# The same for these, which say how the inputs of an existing model are made.
ASKED = ("mean", "std", "image_size", "target", "behaviour")


class GridBudget(GridTable):
    """Which clean examples the methods get: a stratified, seeded draw that all of them share."""

    source: Annotated[Literal["unseen", "train"], Field(alias="from")] = "unseen"
    n: Annotated[int, Field(ge=1)]
    seed: Seed = 0


class Cells(GridTable):
    """Combinations to add or, with `leave_out`, to leave out; a key that is absent means all that the grid has."""

    leave_out: Annotated[bool, Field(strict=True)] = False
    task: Texts | None = None
    attack: Texts | None = None
    rate: Rates | None = None
    victim_seed: Seeds | None = None
    method: Texts | None = None
    budget: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_as_list)] = None
    seed: Seeds | None = None


class Resources(GridTable):
    """The resources of one job: processors and graphics processors (a fraction if several share one)."""

    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    device: Annotated[str | None, AfterValidator(_device)] = None


class File(GridTable):
    """A grid file, table by table."""

    model_config = ConfigDict(title="grid")

    tasks: Annotated[dict[str, GridTask], Field(min_length=1)]
    attacks: list[dict[str, Any]] = Field(default_factory=list)
    methods: list[dict[str, Any]] = Field(default_factory=list)
    detectors: list[dict[str, Any]] = Field(default_factory=list)
    trainers: list[dict[str, Any]] = Field(default_factory=list)
    guards: list[dict[str, Any]] = Field(default_factory=list)
    false_alarms: Alarms | None = None
    budgets: Annotated[list[GridBudget], Field(min_length=1)]
    victim_seeds: Seeds = (0,)
    seeds: Seeds = (0,)
    without: tuple[Literal["clean", "fine-tuning"], ...] = ()
    cells: list[Cells] = Field(default_factory=list)
    resources: Resources = Resources()
