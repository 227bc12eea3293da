"""Messages about a model besides its scores."""

import logging
from pathlib import Path
from typing import Any

from unbackdoor._artifacts.record import failed, handed_back
from unbackdoor._errors import IncompleteError
from unbackdoor._tasks.image_text_score import ImageTextScore
from unbackdoor._tasks.score import Score

logger = logging.getLogger("unbackdoor")


def propose_control(measured: Score | ImageTextScore, classes: int) -> None:
    """Explain attack success if there are two classes and no clean model to compare it with."""
    if classes == 2 and measured.attack_success is not None and measured.clean_model_flip_rate is None:
        logger.info(
            "with two classes, a model without the backdoor also classifies some triggered examples as the attacker "
            "wants: compare attack success with its flip rate, which unbackdoor evaluate --control MODEL prints "
            "(attack none trains one)."
        )


def not_usable(out: Path, record: dict[str, Any]) -> IncompleteError:
    """Returns the error with which a command ends that wrote a model which its record calls not usable."""
    what = "its model is not usable"
    if failed(record):
        what = "it is the suspect as it was" if handed_back(record) else "its model did not pass its tests"
    return IncompleteError(f"{out} is written, but {what}; see the first line above.")
