"""Test examples with the trigger of an attack, for the task that the data is for."""

from unbackdoor._data.dataset import Dataset
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.check import check
from unbackdoor._poisoning.prompts import TriggeredPrompts, triggered_prompts
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered, triggered


def attacked_by(data: Dataset, trigger: Trigger, classes: int) -> Triggered | TriggeredPrompts:
    """Put a trigger on the test examples that the attack is meant to move, or on prompts.

    Args:
        data: clean test examples.
        trigger: an attack as it was planted; with a behaviour for prompts.
        classes: number of classes; 0 for prompts.

    Raises:
        UnbackdoorError: the trigger does not fit the data, or there is nothing to move.
    """
    if trigger.behaviour is None:
        return triggered(data, trigger, classes)
    return prompts_attacked_by(data, trigger, trigger.behaviour)


def prompts_attacked_by(data: Dataset, trigger: Trigger, behaviour: Behaviour) -> TriggeredPrompts:
    """Put a trigger on the prompts whose own answer does not show the behaviour; see `attacked_by`."""
    check(trigger.attack, 0, data)
    return triggered_prompts(data, lambda texts: trigger.attack.apply(texts, trigger.arrays), behaviour)
