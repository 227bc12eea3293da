"""The values of a method's fields if the user leaves them open, for images and for texts."""

import dataclasses
import re

import pytest

import toys
from unbackdoor import purifiers

OPEN = [
    (entry, item.name)
    for entry in purifiers.REGISTRY
    for item in dataclasses.fields(entry.resolve())
    if item.default is None and item.name in ("learning_rate", "batch_size")
]
KINDS = {"images": "images", "text": "texts", "conversations": "conversations", "image-text": "pairs"}


@pytest.mark.parametrize(("entry", "field"), OPEN, ids=lambda part: getattr(part, "name", part))
def test_the_help_says_what_an_open_field_is_for_each_modality(entry, field: str) -> None:
    method = toys.a_method(entry)
    found = re.search(rf"\n        {field}: (.*?)(?=\n        \w+: |\n\n|$)", type(method).__doc__, re.DOTALL)
    words = "" if found is None else " ".join(found[1].partition("None is ")[2].split())
    parts = re.findall(r"(\d[\d.e-]*)(?: \(\w+\))?(?: for ((?:(?!\d)[^,.;])*))?", words)
    assert parts, f"the docstring of {type(method).__name__} must say what None is for `{field}`, with a number"
    for modality in entry.modality:
        number = next((number for number, kinds in parts if KINDS[modality] in kinds), parts[0][0])
        assert toys.a_run(modality=modality).setting(method, field) == float(number.rstrip("."))


def test_what_the_user_sets_counts() -> None:
    assert toys.a_run().setting(purifiers.FTSAM(learning_rate=0.3), "learning_rate") == 0.3
    assert toys.a_run(modality="text").setting(purifiers.FTSAM(batch_size=3), "batch_size") == 3
