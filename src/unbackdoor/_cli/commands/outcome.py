"""What commands say of a model beyond its scores."""

import logging
from pathlib import Path

from unbackdoor._errors import IncompleteError
from unbackdoor._tasks.score import Score

logger = logging.getLogger("unbackdoor")


def propose_control(measured: Score, classes: int) -> None:
    """Explain attack success if there are two classes and no clean model to compare it with."""
    if classes == 2 and measured.attack_success is not None and measured.clean_model_flip_rate is None:
        logger.info(
            "with two classes, a model without the backdoor also takes some triggered examples for what the attacker "
            "wants: hold attack success against its flip rate, which --control MODEL prints (attack none trains one)."
        )


def not_usable(out: Path) -> IncompleteError:
    """What the commands end with that wrote a model which lost its use."""
    return IncompleteError(f"{out} is written, but its model is not usable, as is said above.")
