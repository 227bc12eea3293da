"""Messages about a model besides its scores."""

import logging
from pathlib import Path

from unbackdoor._errors import IncompleteError
from unbackdoor._tasks.image_text_score import ImageTextScore
from unbackdoor._tasks.score import Score

logger = logging.getLogger("unbackdoor")


def propose_control(measured: Score | ImageTextScore, classes: int) -> None:
    """Explain attack success if there are two classes and no clean model to compare it with."""
    if classes == 2 and measured.attack_success is not None and measured.clean_model_flip_rate is None:
        logger.info(
            "with two classes, a model without the backdoor also classifies some triggered examples as the attacker "
            "wants: compare attack success with its flip rate, which --control MODEL prints (attack none trains one)."
        )


def not_usable(out: Path) -> IncompleteError:
    """Returns the error with which a command ends that wrote an unusable model."""
    return IncompleteError(f"{out} is written, but its model is not usable; see the first line above.")
