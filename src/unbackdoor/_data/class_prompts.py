"""The texts that stand for each class when a model of images and texts classifies without training for it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor._data.labels import alike
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import RECORD, any_json, read_text

PLACE = "{}"


@dataclass(frozen=True)
class ClassPrompts:
    """Prompts by class: templates for every class, or texts for each.

    Args:
        templates: texts with `{}` at the place of the class name; not used for classes with texts of their own.
        texts: the texts of each class, by its name; none if templates make them.
    """

    templates: tuple[str, ...] = ("a photo of a {}.",)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: "str | Path | ClassPrompts | None") -> "ClassPrompts":
        """Returns the prompts that a user means.

        Args:
            prompts: a template with `{}`; a JSON file with a list of templates, or with the text, or the texts, of each
                class by its name; None for "a photo of a {}."

        Raises:
            UnbackdoorError: a text without `{}` names no file, or the file has something else than texts by class.
        """
        if isinstance(prompts, ClassPrompts):
            return prompts
        if prompts is None:
            return cls()
        if PLACE in str(prompts):
            return cls((str(prompts),))
        if not os.path.lexists(prompts):
            raise UnbackdoorError(
                f"`prompts` must have {PLACE} at the place of the class name, as in 'a photo of a {PLACE}.', or name a "
                f"JSON file with a list of them or a text for each class, got {printable(repr(str(prompts)))}."
            )
        content = any_json(read_text(Path(prompts), RECORD), prompts)
        if isinstance(content, list):
            return cls(_templates(content, prompts))
        return cls(texts=_texts_by_class(content, prompts))

    @classmethod
    def recorded(cls, entry: Any) -> "ClassPrompts":
        """Returns the prompts of a record; the usual ones if it has none."""
        try:
            templates = [text for text in entry["templates"] if isinstance(text, str) and PLACE in text]
            texts = _texts_by_class(entry["texts"], "record.json") if entry["texts"] else {}
        except (TypeError, KeyError, UnbackdoorError):
            return cls()
        return cls(tuple(templates), texts) if templates else cls(texts=texts)

    def to_json(self) -> dict[str, Any]:
        """Templates and texts, for a record."""
        return {"templates": list(self.templates), "texts": {name: list(each) for name, each in self.texts.items()}}

    def of_classes(self, classes: Sequence[str] | None, count: int, where: str) -> list[tuple[str, ...]]:
        """Returns the texts of each class, in label order.

        Args:
            classes: names in label order; None if they are unknown.
            count: number of classes.
            where: name of the data, for messages.

        Raises:
            UnbackdoorError: a class has no prompt, since the file lacks it, or it has no name to put into a template.
        """
        known = {alike(name): texts for name, texts in self.texts.items()}
        prompts = []
        for label in range(count):
            name = classes[label] if classes is not None and label < len(classes) else None
            if self.texts:
                texts = known.get(alike(str(label) if name is None else name))
                if texts is None:
                    raise UnbackdoorError(
                        f"`prompts` has no text for the class {printable(repr(str(label) if name is None else name))} "
                        f"of {where}. Add it to the file, or give a template with {PLACE}."
                    )
            elif name is None:
                raise UnbackdoorError(
                    f"{where} has no name for class {label}, so that a template makes no prompt. Give labels as names, "
                    "or `prompts` as a JSON file with a text for each number."
                )
            else:
                texts = tuple(template.replace(PLACE, name.replace("_", " ")) for template in self.templates)
            prompts.append(texts)
        return prompts


def _templates(content: list[Any], where: object) -> tuple[str, ...]:
    wrong = next((text for text in content or [""] if not isinstance(text, str) or PLACE not in text), None)
    if wrong is not None:
        raise UnbackdoorError(
            f"{where} must be a JSON list of texts with {PLACE} at the place of the class name, got "
            f"{printable(repr(wrong))} in it."
        )
    return tuple(content)


def _texts_by_class(content: Any, where: object) -> dict[str, tuple[str, ...]]:
    texts = {}
    for name, entry in content.items() if isinstance(content, dict) else ():
        each = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, list) else ()
        if not each or not all(isinstance(text, str) and text.strip() for text in each):
            raise UnbackdoorError(f"{where} must have a text, or a list of texts, for the class {printable(name)}.")
        texts[str(name)] = each
    if not texts:
        raise UnbackdoorError(f'{where} must be a JSON object with a text for each class, as {{"cat": "a cat"}}.')
    return texts
