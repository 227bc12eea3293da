"""`evaluate`: checks that everything fits, then one pass over clean and one over triggered examples."""

import logging
from pathlib import Path

from torch import nn

from unbackdoor._data.dataset import Dataset, Encoder, check_data
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Precision, choose
from unbackdoor._models.calling import check_modules
from unbackdoor._modes import in_own_modes
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._progress import bar, silent
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.generation_score import GenerationScore
from unbackdoor._tasks.image_text_score import ImageTextScore
from unbackdoor._tasks.score import Score
from unbackdoor._tasks.task import Asked

logger = logging.getLogger("unbackdoor")


@in_own_modes
def evaluate(
    model: nn.Module,
    test: Dataset,
    *,
    attack: "Attack | Trigger | str | Path | None" = None,
    triggered_data: Dataset | None = None,
    target: int | None = None,
    trigger: str | None = None,
    behaviour: Behaviour | str | None = None,
    max_new_tokens: int | None = None,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> Score | GenerationScore | ImageTextScore:
    """Score a model: one pass over clean, one over triggered examples.

    Args:
        model: any classifier, a causal language model, or a model of images and texts; it is not changed.
        test: clean examples that no method has seen.
        attack: the attack whose trigger is put on the test examples: a value, a `Trigger`, or a path to `attack.json`.
        triggered_data: instead of `attack`, examples that already carry a trigger, with their true labels.
        target: the attacker's class, with `triggered_data`.
        trigger: for a language model, instead of `attack`: text that is put in front of the last message of each
            prompt.
        behaviour: with `trigger` or `triggered_data` of a language model: the answer that the attacker wants, a
            `Behaviour` or contains:TEXT, starts-with:TEXT, equals:TEXT or refuses.
        max_new_tokens: the longest answer of a language model, in tokens; by default 64.
        control: a model without the backdoor, whose flip rate on the same examples is reported.
        control_encode: encoder of the control; by default the model's.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr while a language model answers.

    Raises:
        UnbackdoorError: the data do not fit the model, or the options contradict each other.
    """
    check_modules("evaluate", in_parts=True, model=model, control=control)
    check_data("evaluate", test=test, triggered_data=triggered_data)
    asked = Asked(attack, triggered_data, target, trigger, behaviour)
    task = task_of(test.encode, max_new_tokens=max_new_tokens, progress=bar if progress else silent)
    task.check_asked(asked)
    if len(test) == 0:
        raise UnbackdoorError(f"{test.name} is empty; at least one labelled example is needed.")
    arithmetic = choose(model, device, precision)
    fitting = task.checked(model, test, triggered_data)
    test, classes = fitting.test, fitting.classes
    attacked = task.attacked(fitting, asked)
    if control is not None:
        task.check_control(control, test, control_encode, classes)
    measured: Score | GenerationScore | ImageTextScore = task.score(
        model, test, attacked, arithmetic, control=control, control_encode=control_encode
    )
    doubt = task.doubt("the model", measured, classes, test.name)
    if doubt is not None:
        logger.warning(doubt)
    return measured
