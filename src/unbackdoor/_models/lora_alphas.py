"""The alpha of each layer of a LoRA adapter, by the patterns in its config, as `peft` reads them."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError, printable

# A pattern comes from somebody else; with many groups or repetitions, matching a name could take hours.
_LONGEST = 300  # characters
_PARTS = 4  # groups and repetitions
_PART = re.compile(r"[(*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


def alphas(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Returns the alpha of each layer: that of the first pattern which matches its name, else the common one.

    A pattern is a regular expression that matches the whole name or the end of it behind a dot.

    Args:
        path: the directory of the adapter, for messages.
        config: the content of its `adapter_config.json`.
        names: names of its layers.

    Raises:
        UnbackdoorError: an alpha is not a number; or a pattern is no regular expression, or one that may take hours.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _refused(path, "alpha_pattern", patterns)
    own = [(_compiled(path, pattern), _number(path, alpha)) for pattern, alpha in patterns.items()]
    common = _number(path, config.get("lora_alpha", 8))
    return {name: next((alpha for pattern, alpha in own if pattern.match(name)), common) for name in names}


def _number(path: Path, alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise _refused(path, "lora_alpha", alpha)
    return alpha


def _refused(path: Path, field: str, content: object) -> UnbackdoorError:
    allowed = "a number" if field == "lora_alpha" else "numbers by pattern"
    return UnbackdoorError(f"{path} must have {field} as {allowed}, got {printable(str(content))}. Fetch it again.")


def _compiled(path: Path, pattern: str) -> re.Pattern[str]:
    simple = len(pattern) <= _LONGEST and len(_PART.findall(pattern)) <= _PARTS and not _REPEATED_GROUP.search(pattern)
    with contextlib.suppress(re.error, OverflowError):
        if simple:
            return re.compile(rf"(.*\.)?({pattern})$")
    raise UnbackdoorError(
        f"{path} has the pattern {printable(pattern)} in alpha_pattern, which must be a regular expression of at most "
        f"{_LONGEST} characters and {_PARTS} groups and repetitions, without a repeated group. Merge it into its base "
        "(merge_and_unload of peft) and give the result."
    )
