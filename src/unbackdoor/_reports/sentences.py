"""Sentences that several pages share."""

from unbackdoor._tasks.proportion import Proportion


def percent(share: float) -> str:
    """A share in [0, 1] with one decimal; a narrow space that does not break before the sign."""
    return f"{100 * share:.1f}\u202f%"


def caution(before: Proportion | None, evidence: str) -> str:
    """The limits of what a page proves.

    Args:
        before: attack success of the suspect; None if no trigger was tried.
        evidence: what the numbers are about, such as "one trigger".
    """
    if before is None:
        return (
            "No trigger was tried, so this page shows the cost of the purification, but not whether there was a "
            "backdoor or whether it is gone."
        )
    text = (
        f"This is evidence about {evidence}, not proof of a clean model: another trigger may still work, and tuning on "
        "poisoned examples may bring this one back."
    )
    if before.value < 0.9:
        text += " The suspect's backdoor was weak before the purification, so its fall says little."
    return text
