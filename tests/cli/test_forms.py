"""The forms of classes that help shows have what the classes themselves have."""

import dataclasses
from typing import Any, get_type_hints

import pytest

from unbackdoor import purifiers
from unbackdoor._cli.app import main
from unbackdoor._cli.forms import form, in_words
from unbackdoor._cli.listing import KINDS
from unbackdoor._registry.entries import Entry


def facts(cls: type) -> tuple[Any, ...]:
    """Name, docstring in words, and of each field the name, the default and the type with its bounds."""
    types = get_type_hints(cls, include_extras=True)
    fields = [(field.name, field.default, repr(types[field.name])) for field in dataclasses.fields(cls)]
    return cls.__name__, in_words(cls.__doc__ or ""), fields


def test_forms_have_the_fields_and_the_docstrings_of_the_classes() -> None:
    for kind, entries in KINDS.items():
        for entry in entries if kind != "archs" else ():
            assert facts(form(entry)) == facts(entry.resolve()), entry.name


def test_a_class_from_elsewhere_is_its_own_form() -> None:
    entry = Entry("fractions:Fraction", "fractions:Fraction", "")
    assert form(entry) is entry.resolve()


def test_after_two_dashes_help_is_the_name_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["purify", "fst", "--clean", "clean.csv", "--out", "out", "--", "--help"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "--help does not exist, and is not a valid Hub name. Check it.\n"


@pytest.mark.parametrize("name", ["fst", "signature-zeroing"])
def test_help_is_that_of_the_class(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")

    def shown() -> str:
        with pytest.raises(SystemExit):
            main(["purify", name, "--help"])
        return capsys.readouterr().out

    of_the_form = shown()

    def resolved(entry: Entry) -> type:
        cls = entry.resolve()
        return type(cls.__name__, (cls,), {"__doc__": in_words(cls.__doc__), "__module__": form.__module__})

    monkeypatch.setattr("unbackdoor._cli.parser.form", resolved)
    assert shown() == of_the_form
    assert f"Options of {name}" in of_the_form
    assert next(entry for entry in purifiers.REGISTRY if entry.name == name).resolve().__doc__[:20] in of_the_form
