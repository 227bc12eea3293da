"""The options that commands have beside those of their method or attack, declared once."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded.

    Args:
        factory: FILE.py:FUNCTION that makes the module, for a model that is no Hugging Face directory. It is run.
        mean: subtracted per channel from pixels in [0, 1], as 0.49,0.48,0.45; instead of the model's own.
        std: divided by, per channel.
        image_size: side that images are resized to, instead of the model's own.
        max_length: tokens that a text model reads, instead of the most that it can.
        trust_remote_code: run Python files that come with a Hugging Face model.
        device: cpu, cuda, cuda:1 and so on; a GPU where there is one.
        precision: auto takes bfloat16 where the hardware multiplies it.
        columns: the data's own column names, as image=img,label=fine_label or text_a=question,text_b=sentence.
    """

    factory: str | None = None
    mean: str | None = None
    std: str | None = None
    image_size: int | None = None
    max_length: int | None = None
    trust_remote_code: bool = False
    device: str | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    columns: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PurifyOptions(ModelOptions):
    """Options of `purify`.

    Args:
        clean: labelled examples without trigger: parquet, CSV, JSON lines, image folder or saved data set.
        base: the pre-trained model that the suspect came from, for methods that need it.
        proxy: another model for the same task, for methods that need it.
        out: directory to write; it must not exist.
        data: test examples; suspect and result are scored on them, and report.html is written.
        attack: attack.json whose trigger is put on the test examples.
        control: with --attack: a model that never was poisoned, loaded as MODEL is; how often it flips is scored, too.
        seed: of everything random.
        head: name of the last linear layer, where it cannot be found by running the model.
        augment: auto mirrors images unless the class names tell left from right; crop never does, flip always.
        stream: with fine-mixing --rho R --no-tune (and e-pur before it): mix on disk, piece by piece, for checkpoints
            larger than memory.
        overwrite: replace a directory that unbackdoor wrote.
    """

    clean: str | None = None
    out: str
    base: str | None = None
    proxy: str | None = None
    data: str | None = None
    attack: str | None = None
    control: str | None = None
    seed: int = 0
    head: str | None = None
    augment: Literal["auto", "flip", "crop", "none"] = "auto"
    stream: bool = False
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """Options of `attack`.

    Args:
        data: training examples; several files or a pattern are joined.
        out: directory to write; it must not exist.
        test: test examples; without them a seeded tenth of the training examples is held out.
        rate: poisoned examples over all training examples.
        arch: of the victim: resnet18, preact-resnet18, wrn16 or vit.
        width: channels of the first stage (64 in the papers; 16 trains on two cores).
        base: start from this Hugging Face image classifier, or pre-trained text model, instead of --arch.
        epochs: passes over the training examples; by default 15 for images and 3 for texts.
        clean_epochs: passes over the clean training examples afterwards, as a user does who tunes a published model.
        learning_rate: its peak; by default 0.1 for --arch (1e-3 for vit), 0.01 for --base, 5e-5 for texts.
        batch_size: examples per step; by default 128 for images and 32 for texts.
        max_length: tokens of a text that the victim reads; by default as many as it can.
        seed: of the draw of rows, the initial weights and the batches.
        group: column whose equal values, within a class, stay together when a tenth is held out (track for GTSRB).
        triggered_test: with prepared: test examples that carry the trigger, with their true labels.
        surrogate: with label-consistent, low-frequency and siba: a clean model to make the trigger against; else one is
            trained first.
        control: a model that never was poisoned (attack none trains one); how often it flips is scored, too.
        augment: auto mirrors images unless the class names tell left from right; crop never does, flip always.
        columns: the data's own column names, as image=img,label=fine_label or text_a=question,text_b=sentence.
        device: cpu, cuda, cuda:1 and so on; a GPU where there is one.
        precision: auto takes bfloat16 where the hardware multiplies it.
        overwrite: replace a directory that unbackdoor wrote.
    """

    data: list[str]
    out: str
    test: str | None = None
    rate: float = 0.05
    arch: str = "resnet18"
    width: int = 16
    base: str | None = None
    epochs: int | None = None
    clean_epochs: int = 0
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    seed: int = 0
    group: str | None = None
    triggered_test: str | None = None
    surrogate: str | None = None
    control: str | None = None
    augment: Literal["auto", "flip", "crop", "none"] = "auto"
    columns: str | None = None
    device: str | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Options of `evaluate`.

    Args:
        data: clean test examples: parquet, CSV, JSON lines, image folder or saved data set.
        attack: attack.json whose trigger is put on them.
        triggered: examples that already carry a trigger, with their true labels.
        target: the class that the attacker wants, with --triggered.
        control: a model without the backdoor, loaded as MODEL is; how often it flips is printed beside.
        json: print one JSON object.
    """

    data: str
    attack: str | None = None
    triggered: str | None = None
    target: int | None = None
    control: str | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StressOptions(ModelOptions):
    """Options of `stress`.

    Args:
        victim: the model before purification, loaded as MODEL is.
        clean: labelled examples without trigger, which the attacker tunes with.
        attack: attack.json of the victim.
        data: test examples to score on; without them a seeded half of --clean is kept for that.
        control: a model of the same task that never was poisoned, loaded as MODEL is.
        out: directory for stress.json and stress.html; it must not exist.
        json: print one JSON object.
        parts: which of retune, reactivation, path and exact (purification by an oracle), with commas between.
        k: triggered examples among the clean ones while retuning, with commas between.
        seed: of everything random.
        seeds: how many draws of the triggered examples are tried, from --seed on.
        augment: auto mirrors images unless the class names tell left from right; crop never does, flip always.
        overwrite: replace a directory that unbackdoor wrote.
    """

    victim: str
    clean: str
    attack: str
    data: str | None = None
    control: str | None = None
    out: str | None = None
    json: bool = False
    parts: str = "retune,reactivation,path,exact"
    k: str = "1,2,5,10,20"
    seed: int = 0
    seeds: int = 1
    augment: Literal["auto", "flip", "crop", "none"] = "auto"
    overwrite: bool = False
