"""`evaluate`: checks that everything fits, then one pass over clean and one over triggered examples."""

import logging
from pathlib import Path

from torch import nn

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Precision, choose
from unbackdoor._models.calling import check_modules, check_partner
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.attack_file import as_trigger
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered, already_triggered, triggered
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.score import Score

logger = logging.getLogger("unbackdoor")


def evaluate(
    model: nn.Module,
    test: Dataset,
    *,
    attack: "Attack | Trigger | str | Path | None" = None,
    triggered_data: Dataset | None = None,
    target: int | None = None,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
    device: str | None = None,
    precision: Precision = "auto",
) -> Score:
    """Score a model: one pass over clean, one over triggered examples.

    Args:
        model: any classifier; it is not changed.
        test: clean examples that no method has seen.
        attack: the attack whose trigger is put on the test examples: a value, a `Trigger`, or a path to `attack.json`.
        triggered_data: instead of `attack`, examples that already carry a trigger, with their true labels.
        target: the attacker's class, with `triggered_data`.
        control: a model without the backdoor, whose flip rate on the same examples is reported.
        control_encode: encoder of the control; by default the model's.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.

    Raises:
        UnbackdoorError: the data do not fit the model, or the options contradict each other.
    """
    check_modules("evaluate", model=model, control=control)
    if attack is not None and triggered_data is not None:
        raise UnbackdoorError("evaluate takes `attack` or `triggered_data`, got both. Leave one out.")
    if (triggered_data is None) != (target is None):
        raise UnbackdoorError(
            "`triggered_data` and `target` go together: the examples, and the class that the attacker wants."
        )
    if len(test) == 0:
        raise UnbackdoorError(f"{test.name} is empty; at least one labelled example is needed.")
    arithmetic = choose(model, device, precision)
    task = CLASSIFICATION
    fitting = task.checked(model, test, triggered_data)
    test, classes = fitting.test, fitting.classes
    attacked: Triggered | None = None
    if attack is not None:
        attacked = triggered(test, as_trigger(attack, test), classes)
    elif fitting.triggered is not None and target is not None:
        attacked = already_triggered(fitting.triggered, target, classes)
    if control is not None:
        check_partner("`control`", control, test, control_encode, classes)
    measured = task.score(model, test, attacked, arithmetic, control=control, control_encode=control_encode)
    doubt = task.doubt("the model", measured, classes, test.name)
    if doubt is not None:
        logger.warning(doubt)
    return measured
