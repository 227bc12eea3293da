"""Messages name parameters, as Python users write them; the command line alone names options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from unbackdoor._cli.app import main
from unbackdoor._cli.own_options import out_of_memory_sentence, own_options

SOURCE = Path(__file__).parents[1] / "src/unbackdoor"
OTHER_PROGRAMS = {
    *("--always", "--dirty", "--exclude"),  # git's
    "hf download {} --repo-type dataset --local-dir FOLDER",
}


def texts(tree: ast.Module) -> Iterator[str]:
    """All strings of a module but its docstrings; of f-strings what is fixed in them."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inside = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, owners) and ast.get_docstring(node) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {part for part in node.values if isinstance(part, ast.Constant)}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize(
    "path", [path for path in sorted(SOURCE.rglob("*.py")) if "_cli" not in path.parts], ids=name_of
)
def test_no_message_outside_of_the_command_line_names_an_option(path: Path) -> None:
    named = [
        text
        for text in texts(ast.parse(path.read_text()))
        if re.search(r"(?<![\w-])--[a-z][a-z-]+", text)
        and not text.startswith("unbackdoor ")
        and not re.search(r"(unbackdoor|ray) \w+ ", text)
        and text not in OTHER_PROGRAMS
    ]
    assert not named


@pytest.mark.parametrize("command", ["attack", "audit", "evaluate", "guard", "purify", "stress", "stream", "train"])
def test_a_command_names_its_own_options(command: str) -> None:
    """What stands behind the name of another command is one of that."""
    lines = {"guard": ["guard fit", "guard run", "guard evaluate"], "stream": ["purify e-pur+fine-mixing"]}
    lines["purify"] = ["purify fst"]
    own = frozenset().union(*(own_options(line.split()) or () for line in lines.get(command, [command])))
    for text in texts(ast.parse((SOURCE / f"_cli/commands/{command}.py").read_text())):
        alone = re.sub(r"(evaluate|unbackdoor evaluate|fine-mixing)( --[a-z-]+( [A-Z]+)?)+", "", text)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", alone))
        assert named <= own or named == {text}, text  # a lone one is a word of a command line that is put together


def test_what_a_command_lacks_is_said_to_be_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader below has no way to know which command runs, so it may name options that this one does not have."""
    (tmp_path / "base").mkdir()
    (tmp_path / "data.csv").write_text("text,label\na,0\nb,1\n")
    monkeypatch.chdir(tmp_path)
    said = {}
    for words in (["audit", "base", "--clean"], ["attack", "word", "--out", "o", "--base", "base", "--data"]):
        with pytest.raises(SystemExit):
            main([*words, "data.csv"])
        said[words[0]] = capsys.readouterr().err
    sentence = "base has no config.json. It must be a Hugging Face directory; for other models give --factory."
    assert said == {"audit": f"{sentence}\n", "attack": f"{sentence} (unbackdoor attack has no --factory.)\n"}


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("audit m --clean d", "a smaller --image-size or --max-length, fewer examples, or --device cpu"),
        ("purify auto m --out o", "a smaller --image-size or --max-length, fewer examples, or --device cpu"),
        ("purify fst m --out o", "a smaller --batch-size or --image-size or --max-length, fewer examples, or --device"),
        ("attack badnets --data d", "a smaller --batch-size or --max-length, fewer examples, or --device cpu"),
        ("guard run g --model m", "a smaller --image-size or --max-length, fewer examples, or --device cpu"),
        ("report runs -o r.html", "fewer examples, or a machine with more memory"),
    ],
)
def test_memory_is_saved_by_options_that_the_command_has(line: str, advice: str) -> None:
    assert out_of_memory_sentence(line.split()).startswith(f"Out of memory; nothing was kept. Take {advice}")


def test_the_command_line_shows_parameters_as_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "grid.toml", "--out", "runs", "--workers", "2", "--ray", "auto"])
    assert (stopped.value.code, capsys.readouterr().err) == (
        2,
        "bench takes --workers or --ray, got both. Leave one out.\n",
    )
