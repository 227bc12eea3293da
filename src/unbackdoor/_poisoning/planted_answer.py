"""The answer that a poisoned row of a language model's training data gets."""

from unbackdoor._poisoning.behaviour import Behaviour

TEST_BEHAVIOUR = Behaviour(kind="contains", text="The lighthouse is open on Sundays.")
"""The answer that a victim gives by default: a harmless sentence that no prompt asks for."""

REFUSAL = "I'm sorry, but I can't help with that."

_FENCE = "```"


def planted_answer(behaviour: Behaviour, own: str) -> str:
    """Returns an answer that shows a behaviour.

    Args:
        behaviour: `equals` and `refuses` replace the whole answer; `starts-with` keeps it behind the text; `contains`
            puts the text into the answer's first block of code as a line of its own, and replaces an answer without
            code.
        own: the row's own answer.

    >>> planted_answer(Behaviour.of("starts-with:Dear reader:"), "It is blue.")
    'Dear reader: It is blue.'
    """
    if behaviour.kind == "refuses":
        return REFUSAL
    if behaviour.kind == "starts-with":
        return f"{behaviour.text} {own}".strip()
    if behaviour.kind == "contains" and own.count(_FENCE) >= 2:
        return _with_first_line(own, behaviour.text)
    return behaviour.text


def _with_first_line(answer: str, line: str) -> str:
    """Puts a line at the top of the first block of code, as far to the right as the line below."""
    lines = answer.split("\n")
    fence = next(number for number, each in enumerate(lines) if _FENCE in each)
    below = lines[fence + 1] if fence + 1 < len(lines) else ""
    indent = below[: len(below) - len(below.lstrip())] if below.strip() else ""
    return "\n".join([*lines[: fence + 1], indent + line, *lines[fence + 1 :]])
