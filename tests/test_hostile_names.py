"""Names that others chose, in all that is printed and written: one line, printable, and short."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "hostile"))

import material

import stores
from commands import run
from unbackdoor import Dataset, audit, detectors
from unbackdoor._bench import Store
from unbackdoor._reports import evidence
from unbackdoor._reports.audit_page import build_audit
from unbackdoor._reports.bom import as_bom
from unbackdoor._reports.render import render_audit
from unbackdoor._reports.sarif import as_sarif

LINE, TERMINAL, DIRECTION = "a\nb", "\x1b[2J", "\u202egnp.x"
LONG = "z" * 10_000
NAMES = [f"{LINE}{TERMINAL}{DIRECTION}", f"{TERMINAL}{LONG}"]
FOLDER = f"my\n{TERMINAL}{DIRECTION}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a folder of both, with hostile names of everything that can have one."""
    things = tmp_path_factory.mktemp("material") / "material"
    material.make(things)
    folder = tmp_path_factory.mktemp("names") / FOLDER
    folder.mkdir()
    shutil.copytree(things / "text", folder / f"model{DIRECTION}")
    shutil.copytree(things / "word", folder / "word")
    config = folder / f"model{DIRECTION}" / "config.json"
    content = json.loads(config.read_text())
    content |= {"id2label": dict(enumerate(NAMES)), "label2id": {name: at for at, name in enumerate(NAMES)}}
    config.write_text(json.dumps(content))
    rows = [line.rsplit(",", 1) for line in (things / "texts.csv").read_text().splitlines()[1:]]
    column = f"te{LINE}{TERMINAL}{LONG}"
    lines = [json.dumps({column: text, "label": NAMES[int(label)]}) for text, label in rows]
    (folder / f"data{DIRECTION}.jsonl").write_text("\n".join(lines))
    others = [json.dumps({column: f"{text} and it is so", "label": NAMES[int(label)]}) for text, label in rows]
    (folder / f"test{TERMINAL}.jsonl").write_text("\n".join(others))
    return folder


def harmless(text: str, longest: int) -> bool:
    """Whether each line is printable and short."""
    return all(line.isprintable() and len(line) <= longest for line in text.replace("\t", " ").split("\n"))


@pytest.mark.long
def test_what_commands_print_and_write(place: Path) -> None:
    model, data, test = f"model{DIRECTION}", f"data{DIRECTION}.jsonl", f"test{TERMINAL}.jsonl"
    columns = ("--columns", f"text=te{LINE}{TERMINAL}{LONG}")
    scored = ("--data", test, "--attack", "word/attack.json")
    purified = run(
        *(
            "purify",
            "fine-tuning",
            model,
            "--clean",
            data,
            *columns,
            "--epochs",
            1,
            *scored,
            "--out",
            f"out{DIRECTION}",
        ),
        cwd=place,
    )
    evaluated = run("evaluate", model, *scored, *columns, "--control", model, cwd=place)
    stressed = run(
        *("stress", f"out{DIRECTION}", "--victim", model, "--clean", data, *scored, *columns, "--parts", "retune"),
        *("--k", 2, "--seeds", 1, "--out", f"stress{TERMINAL}"),
        cwd=place,
    )
    audited = run(
        *("audit", model, "--clean", data, *columns, "--unlabelled", test, "--out", f"audit{DIRECTION}"),
        *("--sarif", f"audit{DIRECTION}/a{LINE}.sarif", "--bom", f"b{TERMINAL}.json"),
        cwd=place,
    )
    for done in (purified, evaluated, stressed, audited):
        assert done.returncode in (0, 1), done.stderr
        assert harmless(done.stdout, 1200), done.stdout
        assert harmless(done.stderr, 1200), done.stderr
    for path in (place / f"audit{DIRECTION}/a{LINE}.sarif", place / f"b{TERMINAL}.json"):
        assert harmless(path.read_text(encoding="utf-8"), 1200), path
    folders = (f"out{DIRECTION}", f"stress{TERMINAL}", f"audit{DIRECTION}")
    written = [path for folder in folders for path in (place / folder).iterdir()]
    texts = [path for path in written if path.suffix in (".md", ".html")]
    assert sorted(path.name for path in texts) == ["README.md", "audit.html", "report.html", "stress.html"]
    for path in texts:
        content = path.read_text(encoding="utf-8").translate({0xA0: " ", 0x202F: " "})  # the pages' own
        assert harmless(content, 20_000), path
        typed = re.compile("<pre>.*?</pre>")  # the command, which must repeat the run, and so has the whole name
        assert "z" * 1000 not in typed.sub("", content)


def test_an_audit_of_classes_with_hostile_names(backdoored: tuple, digits: Dataset, tmp_path: Path) -> None:
    names = tuple(
        f"<script>{each}{number}" for number, each in enumerate([LINE, TERMINAL, DIRECTION, LONG, "[a](b)"] * 2)
    )
    clean = replace(digits.select(range(1400, 1440)), classes=names)
    result = audit(backdoored[0], clean, detectors=[detectors.Patch(steps=1, batch_size=16)])
    content = {**result.to_json(), "source": {"model": TERMINAL, "factory": None}, "command": "unbackdoor audit m"}
    (finding,) = result.findings
    assert result.held_out is not None
    examples = evidence.shown(finding, result.held_out, 0)
    files = evidence.write_evidence(tmp_path, finding, result.held_out, examples)
    page = render_audit(build_audit(result, content, (examples,)))
    for text in (page.translate({0xA0: " ", 0x202F: " "}), as_sarif(content), as_bom(content, []), "\n".join(files)):
        assert harmless(text, 20_000)
        assert "z" * 1000 not in text
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", FOLDER, "--data", "d.csv"), "and is not a valid Hub name"),
        (("evaluate", "word", "--data", f"{LONG}.csv"), ""),
        (("purify", TERMINAL, "m"), "There is no purifier"),
        (("report", DIRECTION, "--out", "t.md"), ""),
        (("bench", f"{LINE}.toml", "--out", "runs"), "does not exist"),
        (("attack", "word", "--data", f"{LINE}{TERMINAL}", "--base", "m", "--out", LONG), ""),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, place: Path) -> None:
    done = run(*arguments, cwd=place)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert harmless(done.stderr, 1200)


def test_tables_and_the_page_of_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.start()
    for name in (LINE, TERMINAL, DIRECTION, LONG):
        for of, attacked in (
            (stores.victim(f"word {name}", task={"name": name}), 0.9),
            (stores.victim("none", 0.0, task={"name": name}), None),
        ):
            store.put(stores.spec(of, "none"), stores.result(0.9, attacked))
            store.put(
                stores.spec(of, f"fst {name}", **{name: name}), stores.result(0.8, None if attacked is None else 0.1)
            )
    for name in ("page.html", "t.csv", "t.md", "t.tex"):
        done = run("report", store.address, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert harmless(done.stdout + done.stderr, 1200)
        assert harmless((tmp_path / name).read_text(encoding="utf-8"), 10**6), name
