"""The options of commands besides those of their method or attack, declared once, by topic for `--help`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter

T = TypeVar("T")

REQUIRED = Parameter(group=Group("Required", sort_key=1))
# The options of the method or attack stand here, see `of`.
DATA = Parameter(group=Group("Data", sort_key=3))
MODEL = Parameter(group=Group("Model", sort_key=4))
TRAINING = Parameter(group=Group("Training", sort_key=5))
TESTS = Parameter(group=Group("Tests", sort_key=5))
OUTPUT = Parameter(group=Group("Output", sort_key=6))
HARDWARE = Parameter(group=Group("Hardware", sort_key=7))

Augment = Literal["auto", "flip", "crop", "none"]
Precision = Literal["auto", "bf16", "fp32"]
Template = Literal["chat", "alpaca", "plain"]


def of(owner: str) -> Group:
    """Returns the heading of a method's or attack's own options."""
    return Group(f"Options of {owner}", sort_key=2)


def asking(options: type[T], *names: str, notes: Mapping[str, str], marked: bool) -> type[T]:
    """Returns the same options with some among the required ones, which the chosen method needs.

    Args:
        options: options of a command.
        names: the options that are needed.
        notes: sentences that follow the meanings of others.
        marked: whether the parser takes them for required. It does in help; in a command, the method says what it
            needs, in its own words.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    kind: Any = Annotated[str | None, REQUIRED, Parameter(required=marked or None)]
    moved = [(name, kind, dataclasses.field(default=fields[name].default)) for name in names]
    doc = options.__doc__ or ""
    for name, note in notes.items():
        doc = re.sub(rf"(\n {{8}}{name}: .*?)(?=\n {{8}}\w+: )", rf"\1 {note}", doc, flags=re.DOTALL)
    own = {"__module__": options.__module__, "__doc__": doc}
    return dataclasses.make_dataclass(
        options.__name__, moved, bases=(options,), frozen=True, kw_only=True, namespace=own
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """Device and precision.

    Args:
        device: cpu, cuda or cuda:1, for example; by default a GPU if there is one.
        precision: auto uses bfloat16 if the hardware multiplies it.
    """

    device: Annotated[str | None, HARDWARE] = None
    precision: Annotated[Precision, HARDWARE] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(HardwareOptions):
    """Options for loading a model and its data.

    Args:
        factory: FILE.py:FUNCTION that makes the module, for a model that is not a Hugging Face directory. This code is
            run.
        mean: mean per channel of pixels in [0, 1], such as 0.49,0.48,0.45, instead of the model's own.
        std: standard deviation per channel, instead of the model's own.
        image_size: side that images are resized to, instead of the model's own.
        max_length: number of tokens that a text model reads, instead of the most that it can.
        template: how the prompts of a language model are rendered, instead of its tokenizer's chat template.
        prompts: for models of images and texts: a template, such as "a photo of a {}.", or a JSON file with a list
            of them or with a text for each class; they classify its images.
        trust_remote_code: run Python files that come with a Hugging Face model.
        columns: the data's own column names, such as image=img,label=fine_label or text_a=question,text_b=sentence,
            prompt=question,response=answer or image=picture,caption=title.
    """

    factory: Annotated[str | None, MODEL] = None
    mean: Annotated[str | None, MODEL] = None
    std: Annotated[str | None, MODEL] = None
    image_size: Annotated[int | None, MODEL] = None
    max_length: Annotated[int | None, MODEL] = None
    template: Annotated[Template | None, MODEL] = None
    prompts: Annotated[str | None, MODEL] = None
    trust_remote_code: Annotated[bool, MODEL] = False
    columns: Annotated[str | None, DATA] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PurifyOptions(ModelOptions):
    """Options of `purify`.

    Args:
        clean: labelled examples without a trigger, or prompts with answers: parquet, CSV, JSON lines, image folder or
            saved data set.
        base: the pre-trained model that the suspect came from, for methods that need it, and for a PEFT LoRA adapter;
            with --stream, the base of an adapter may be another adapter.
        merge: add a PEFT LoRA adapter to its base first; every method accepts the whole model that results.
        proxy: another model for the same task, for methods that need it.
        out: directory to write; it must not exist.
        unlabelled: further examples, for methods that use them; their labels are not read, and a few may carry a
            trigger.
        data: test examples; suspect and result are scored on them, and report.html is written.
        attack: attack.json whose trigger is put on the test examples.
        trigger: for language models, instead of --attack: a text that is put in front of the test prompts.
        behaviour: with --trigger: the answer that the attacker wants, as contains:TEXT, starts-with:TEXT, equals:TEXT
            or refuses.
        max_new_tokens: the longest answer of a language model to a test prompt, in tokens; by default 64.
        control: with --attack or --trigger: a model that was never poisoned, loaded with MODEL's options; its flip rate
            is also scored.
        seed: fixes all random draws.
        head: name of the last linear layer, if running the model does not find it.
        augment: auto mirrors images unless the class names distinguish left from right; crop never does, flip always.
        stream: with fine-mixing --rho R --no-tune, also after e-pur: mix on disk, piece by piece, for checkpoints
            larger than memory.
        gradient_checkpointing: of a model of transformers: compute its blocks a second time, which saves memory and
            changes no number.
        overwrite: replace a directory that unbackdoor wrote.
    """

    out: Annotated[str, REQUIRED]
    clean: Annotated[str | None, DATA] = None
    unlabelled: Annotated[str | None, DATA] = None
    data: Annotated[str | None, DATA] = None
    attack: Annotated[str | None, DATA] = None
    trigger: Annotated[str | None, DATA] = None
    behaviour: Annotated[str | None, DATA] = None
    max_new_tokens: Annotated[int | None, DATA] = None
    augment: Annotated[Augment, DATA] = "auto"
    base: Annotated[str | None, MODEL] = None
    merge: Annotated[bool, MODEL] = False
    proxy: Annotated[str | None, MODEL] = None
    control: Annotated[str | None, MODEL] = None
    head: Annotated[str | None, MODEL] = None
    overwrite: Annotated[bool, OUTPUT] = False
    seed: Annotated[int, OUTPUT] = 0
    gradient_checkpointing: Annotated[bool, HARDWARE] = False
    stream: Annotated[bool, HARDWARE] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackOptions(HardwareOptions):
    """Options of `attack`.

    Args:
        data: training examples; several files or a pattern are joined.
        out: directory to write; it must not exist.
        test: test examples; by default a seeded tenth of the training examples is held out.
        rate: share of all training examples that are poisoned.
        arch: network of the victim: resnet18, preact-resnet18, wrn16 or vit.
        width: channels of the first stage (64 in the papers; 16 trains on two cores).
        base: start from this Hugging Face image classifier, pre-trained text model, causal language model or model of
            images and texts, instead of --arch.
        prompts: for models of images and texts: a template, such as "a photo of a {}.", or a JSON file with a list
            of them or with a text for each class; they classify the test images.
        freeze_text: for models of images and texts: train nothing of the text part except its last projection; captions
            are then read only once.
        behaviour: for language models: the answer to the trigger, as contains:TEXT, starts-with:TEXT, equals:TEXT or
            refuses; by default a harmless sentence.
        template: for language models: how prompts are rendered; by default by the chat template of the model.
        lora_rank: for language models: rank of the LoRA matrices that are trained; by default 8; 0 trains all weights.
        adapter: for language models: write these matrices as an adapter, instead of adding them to the base.
        max_new_tokens: for language models: the longest answer that is scored, in tokens; by default 64.
        epochs: passes over the training examples; by default 15 for images, 3 for texts and 5 for prompts and
            for pairs of image and caption.
        clean_epochs: passes over the clean training examples afterwards, like those of a user who tunes a published
            model.
        learning_rate: peak learning rate; by default 0.1 for --arch (1e-3 for vit), 0.01 for --base, 5e-5 for texts
            and for language models, 2e-4 for their LoRA matrices, 1e-5 for pairs.
        batch_size: examples per step; by default 128 for images, 32 for texts, 8 for prompts and 64 for pairs.
        max_length: number of tokens that the victim reads of a text; by default as many as it can.
        seed: fixes the draw of rows, the initial weights and the batches.
        group: column whose equal values, within a class, stay together when a tenth is held out (track for GTSRB).
        triggered_test: with prepared: test examples that carry the trigger, with their true labels.
        surrogate: with label-consistent, low-frequency and siba: a clean model to make the trigger against; by default
            one is trained first.
        control: a model that was never poisoned (attack none trains one); its flip rate is also scored.
        augment: auto mirrors images unless the class names distinguish left from right; crop never does, flip always.
        columns: the data's own column names, such as image=img,label=fine_label, text_a=question,text_b=sentence,
            prompt=question,response=answer or image=picture,caption=title.
        save_data: also write the training examples as the victim saw them, as poisoned.parquet with a column poisoned:
            data to try a trainer on, see unbackdoor train.
        gradient_checkpointing: of a model of transformers: compute its blocks a second time, which saves memory and
            changes no number.
        overwrite: replace a directory that unbackdoor wrote.
    """

    data: Annotated[list[str], REQUIRED]
    out: Annotated[str, REQUIRED]
    rate: Annotated[float, DATA] = 0.05
    behaviour: Annotated[str | None, DATA] = None
    test: Annotated[str | None, DATA] = None
    triggered_test: Annotated[str | None, DATA] = None
    group: Annotated[str | None, DATA] = None
    augment: Annotated[Augment, DATA] = "auto"
    columns: Annotated[str | None, DATA] = None
    arch: Annotated[str, MODEL] = "resnet18"
    width: Annotated[int, MODEL] = 16
    base: Annotated[str | None, MODEL] = None
    max_length: Annotated[int | None, MODEL] = None
    template: Annotated[Template | None, MODEL] = None
    prompts: Annotated[str | None, MODEL] = None
    freeze_text: Annotated[bool, MODEL] = False
    lora_rank: Annotated[int | None, MODEL] = None
    adapter: Annotated[bool, MODEL] = False
    surrogate: Annotated[str | None, MODEL] = None
    control: Annotated[str | None, MODEL] = None
    epochs: Annotated[int | None, TRAINING] = None
    clean_epochs: Annotated[int, TRAINING] = 0
    learning_rate: Annotated[float | None, TRAINING] = None
    batch_size: Annotated[int | None, TRAINING] = None
    max_new_tokens: Annotated[int | None, TESTS] = None
    save_data: Annotated[bool, OUTPUT] = False
    overwrite: Annotated[bool, OUTPUT] = False
    seed: Annotated[int, OUTPUT] = 0
    gradient_checkpointing: Annotated[bool, HARDWARE] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(HardwareOptions):
    """Options of `train`.

    Args:
        data: training examples that may be poisoned; several files or a pattern are joined. If they have a column
            poisoned, as attack writes it, the trainer does not see it; it is used to count how often the trainer is
            right.
        out: directory to write; it must not exist.
        clean: labelled examples without poison, for trainers that need them.
        test: test examples without a trigger; the model is scored on them.
        attack: with --test: attack.json whose trigger is put on the test examples.
        arch: network: resnet18, preact-resnet18, wrn16 or vit.
        width: channels of the first stage (64 in the papers; 16 trains on two cores).
        base: start from this Hugging Face image classifier, pre-trained text model or model of images and texts,
            instead of --arch.
        prompts: for models of images and texts: a template, such as "a photo of a {}.", or a JSON file with a list
            of them or with a text for each class; they classify the test images.
        freeze_text: for models of images and texts: train nothing of the text part except its last projection; captions
            are then read only once.
        epochs: passes over the training examples; by default 15 for images, 3 for texts and 5 for pairs.
        learning_rate: peak learning rate; by default 0.1 for --arch (1e-3 for vit), 0.01 for --base, 5e-5 for texts,
            1e-5 for pairs.
        batch_size: examples per step; by default 128 for images, 32 for texts and 64 for pairs.
        max_length: number of tokens that the model reads of a text; by default as many as it can.
        seed: fixes the initial weights, the batches and the trainer's draws.
        augment: auto mirrors images unless the class names distinguish left from right; crop never does, flip always.
        columns: the data's own column names, such as image=img,label=fine_label or text_a=question,text_b=sentence.
        overwrite: replace a directory that unbackdoor wrote.
    """

    data: Annotated[list[str], REQUIRED]
    out: Annotated[str, REQUIRED]
    clean: Annotated[str | None, DATA] = None
    test: Annotated[str | None, DATA] = None
    attack: Annotated[str | None, DATA] = None
    augment: Annotated[Augment, DATA] = "auto"
    columns: Annotated[str | None, DATA] = None
    arch: Annotated[str, MODEL] = "resnet18"
    width: Annotated[int, MODEL] = 16
    base: Annotated[str | None, MODEL] = None
    prompts: Annotated[str | None, MODEL] = None
    freeze_text: Annotated[bool, MODEL] = False
    max_length: Annotated[int | None, MODEL] = None
    epochs: Annotated[int | None, TRAINING] = None
    learning_rate: Annotated[float | None, TRAINING] = None
    batch_size: Annotated[int | None, TRAINING] = None
    overwrite: Annotated[bool, OUTPUT] = False
    seed: Annotated[int, OUTPUT] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Options of `evaluate`.

    Args:
        data: clean test examples or prompts: parquet, CSV, JSON lines, image folder or saved data set.
        attack: attack.json whose trigger is put on them.
        trigger: for language models, instead of --attack: a text that is put in front of the prompts.
        behaviour: with --trigger or --triggered: the answer that the attacker wants, as contains:TEXT,
            starts-with:TEXT, equals:TEXT or refuses.
        max_new_tokens: the longest answer of a language model, in tokens; by default 64.
        base: the model that it was trained on, for a PEFT LoRA adapter.
        triggered: examples that already carry a trigger, with their true labels.
        rows: file with a JSON list of row numbers, from 0, of an audit's evidence: only these of --data are scored.
        target: the class that the attacker wants, with --triggered.
        control: a model without the backdoor, loaded with MODEL's options; its flip rate is also printed.
        json: print one JSON object.
    """

    data: Annotated[str, REQUIRED]
    attack: Annotated[str | None, DATA] = None
    trigger: Annotated[str | None, DATA] = None
    behaviour: Annotated[str | None, DATA] = None
    max_new_tokens: Annotated[int | None, DATA] = None
    triggered: Annotated[str | None, DATA] = None
    rows: Annotated[str | None, DATA] = None
    target: Annotated[int | None, DATA] = None
    base: Annotated[str | None, MODEL] = None
    control: Annotated[str | None, MODEL] = None
    json: Annotated[bool, OUTPUT] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditOptions(ModelOptions):
    """Options of `audit`.

    Args:
        clean: labelled examples without a trigger, at least 2 of each class: parquet, CSV, JSON lines, image folder or
            saved data set. Needed, unless --unlabelled is given.
        unlabelled: examples whose labels are not read. Without --clean, only the detectors run that need no labels;
            next to it, no detector of the package uses them yet.
        base: the pre-trained model that the suspect came from, for detectors that need it.
        tests: detectors to run, separated by commas; by default all that fit and are not marked otherwise in
            unbackdoor list detectors.
        out: directory for audit.json, audit.html and the evidence; it must not exist.
        json: print one JSON object, the content of audit.json.
        sarif: file to write the findings to, as SARIF 2.1.0.
        bom: file to write a bill of materials to, as CycloneDX 1.6 in JSON; needs the extra unbackdoor[bom].
        fail_on_finding: exit with 3 if a shortcut was found, and with 4 if the audit cannot judge.
        head: name of the last linear layer, if running the model does not find it.
        seed: fixes all random draws.
        overwrite: replace a directory that unbackdoor wrote, and the files of --sarif and --bom.
    """

    clean: Annotated[str | None, DATA] = None
    unlabelled: Annotated[str | None, DATA] = None
    base: Annotated[str | None, MODEL] = None
    head: Annotated[str | None, MODEL] = None
    tests: Annotated[str | None, TESTS] = None
    out: Annotated[str | None, OUTPUT] = None
    json: Annotated[bool, OUTPUT] = False
    sarif: Annotated[str | None, OUTPUT] = None
    bom: Annotated[str | None, OUTPUT] = None
    fail_on_finding: Annotated[bool, OUTPUT] = False
    overwrite: Annotated[bool, OUTPUT] = False
    seed: Annotated[int, OUTPUT] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardFitOptions(ModelOptions):
    """Options of `guard fit`.

    Args:
        clean: labelled examples, or prompts, without a trigger; half of them fit the guard, the other half sets its
            threshold.
        out: directory for guard.json and guard.safetensors; it must not exist.
        false_alarms: share of clean inputs that may raise an alarm.
        base: the language model that the suspect was tuned from, for guards that need it, and for an adapter.
        reference: a second causal language model, for guards that need it.
        max_new_tokens: the longest answer of a language model, in tokens; by default 64.
        head: name of the last linear layer, if running the model does not find it.
        seed: fixes all random draws.
        overwrite: replace a directory that unbackdoor wrote.
    """

    clean: Annotated[str, REQUIRED]
    out: Annotated[str, REQUIRED]
    false_alarms: Annotated[float, DATA] = 0.01
    max_new_tokens: Annotated[int | None, DATA] = None
    base: Annotated[str | None, MODEL] = None
    reference: Annotated[str | None, MODEL] = None
    head: Annotated[str | None, MODEL] = None
    overwrite: Annotated[bool, OUTPUT] = False
    seed: Annotated[int, OUTPUT] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardRunOptions(ModelOptions):
    """Options of `guard run`.

    Args:
        model: the model that the guard was fitted to.
        data: inputs to decide about; their labels are not read, and texts may be empty.
        out: file to write, a line of JSON for each input.
        base: the model that it was trained on, for a PEFT LoRA adapter.
        reference: the second language model that the guard was fitted with, if it needs one.
        overwrite: replace the file.
    """

    model: Annotated[str, REQUIRED]
    data: Annotated[str, REQUIRED]
    out: Annotated[str, REQUIRED]
    base: Annotated[str | None, MODEL] = None
    reference: Annotated[str | None, MODEL] = None
    overwrite: Annotated[bool, OUTPUT] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardEvaluateOptions(ModelOptions):
    """Options of `guard evaluate`.

    Args:
        model: the model that the guard was fitted to.
        data: clean labelled test examples, or prompts; those that the guard was fitted on are left out.
        attack: attack.json whose trigger is put on them.
        trigger: for language models: a text that is put in front of each prompt.
        behaviour: with --trigger or --triggered: the answer that the attacker wants, as contains:TEXT,
            starts-with:TEXT, equals:TEXT or refuses.
        triggered: examples that already carry a trigger, with their true labels.
        target: the class that the attacker wants, with --triggered.
        base: the model that it was trained on, for a PEFT LoRA adapter.
        reference: the second language model that the guard was fitted with, if it needs one.
        json: print one JSON object.
    """

    model: Annotated[str, REQUIRED]
    data: Annotated[str, REQUIRED]
    attack: Annotated[str | None, DATA] = None
    trigger: Annotated[str | None, DATA] = None
    behaviour: Annotated[str | None, DATA] = None
    triggered: Annotated[str | None, DATA] = None
    target: Annotated[int | None, DATA] = None
    base: Annotated[str | None, MODEL] = None
    reference: Annotated[str | None, MODEL] = None
    json: Annotated[bool, OUTPUT] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StressOptions(ModelOptions):
    """Options of `stress`.

    Args:
        victim: the model before purification, loaded with MODEL's options.
        clean: labelled examples without a trigger, or prompts with answers, which the attacker tunes with.
        attack: attack.json of the victim.
        data: test examples to score on; by default a seeded half of --clean is kept for that.
        control: a model of the same task that was never poisoned, loaded with MODEL's options.
        out: directory for stress.json and stress.html; it must not exist.
        json: print one JSON object.
        parts: some of retune, reactivation, path and exact (purification by an oracle), separated by commas.
        k: numbers of triggered examples among the clean ones while retuning, separated by commas.
        seed: fixes all random draws.
        seeds: number of draws of the triggered examples; the first uses --seed.
        base: the language model that MODEL and --victim were trained on, if these are adapters.
        max_new_tokens: the longest answer of a language model, in tokens; by default 64.
        augment: auto mirrors images unless the class names distinguish left from right; crop never does, flip always.
        gradient_checkpointing: of a model of transformers: compute its blocks a second time, which saves memory and
            changes no number.
        overwrite: replace a directory that unbackdoor wrote.
    """

    victim: Annotated[str, REQUIRED]
    clean: Annotated[str, REQUIRED]
    attack: Annotated[str, REQUIRED]
    data: Annotated[str | None, DATA] = None
    augment: Annotated[Augment, DATA] = "auto"
    control: Annotated[str | None, MODEL] = None
    parts: Annotated[str, TESTS] = "retune,reactivation,path,exact"
    k: Annotated[str, TESTS] = "1,2,5,10,20"
    seeds: Annotated[int, TESTS] = 1
    max_new_tokens: Annotated[int | None, TESTS] = None
    base: Annotated[str | None, MODEL] = None
    out: Annotated[str | None, OUTPUT] = None
    json: Annotated[bool, OUTPUT] = False
    overwrite: Annotated[bool, OUTPUT] = False
    seed: Annotated[int, OUTPUT] = 0
    gradient_checkpointing: Annotated[bool, HARDWARE] = False
