"""The command line as a user meets it: what it prints, its exit codes, and what it leaves behind."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unbackdoor.__main__
from commands import Refusals, run, run_script
from pictures import write_pictures
from unbackdoor import Dataset, archs, attacks, detectors, guards, purifiers, purify, trainers
from unbackdoor._artifacts.directories import content, directory
from unbackdoor._cli.app import main
from unbackdoor._interrupts import heeded
from unbackdoor._poisoning.attack_file import describe, save_trigger
from unbackdoor._poisoning.poison import poison

FACTORY = """
from torch import nn


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """A user's folder: a factory, a backdoored model in safetensors, clean and test pictures."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(FACTORY)
    namespace: dict[str, object] = {}
    exec(FACTORY, namespace)
    clean, rest = digits.split(300, seed=0)
    test, train = rest.split(400, seed=0)
    write_pictures(clean, folder / "clean.parquet")
    write_pictures(test, folder / "test.parquet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = namespace["make"]()
    poisoned = poison(train, attacks.BadNets(target=3), rate=0.1, seed=0, classes=10)
    method = purifiers.FineTuning(epochs=15, learning_rate=0.1, batch_size=32)
    raw = poisoned.data.__class__(items=poisoned.data.items, labels=poisoned.data.labels)  # the factory's own encoding
    victim = purify(model, raw, method, precision="fp32").model
    save_file(victim.state_dict(), folder / "weights.safetensors")
    triggered = poisoned.trigger.stamp(test.items)
    marked = Dataset(items=triggered, labels=test.labels)
    write_pictures(marked, folder / "triggered.parquet")
    return folder


@pytest.fixture
def place(workspace: Path, tmp_path: Path) -> Path:
    """A fresh folder with links to the user's files, so that what a command leaves can be seen."""
    for path in workspace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


MODEL = ("weights.safetensors", "--factory", "net.py:make")


def test_the_path_of_a_user_with_a_module_of_their_own(place: Path) -> None:
    arguments = ("purify", "fine-tuning", *MODEL, "--clean", "clean.parquet", "--out", "out", "--data", "test.parquet")
    done = run(*arguments, cwd=place)
    assert done.returncode == 0, done.stdout
    assert "clean accuracy" in done.stdout
    assert {path.name for path in (place / "out").iterdir()} == {
        "model.safetensors",
        "record.json",
        "README.md",
        "report.html",
    }
    before, after = load_file(place / "weights.safetensors"), load_file(place / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    record = json.loads((place / "out" / "record.json").read_text())
    assert record["method"]["name"] == "fine-tuning"
    assert record["scores"]["suspect"]["clean_accuracy"]["n"] == 400
    assert str(place) not in json.dumps(record)

    scored = run(
        *("evaluate", "out", "--factory", "net.py:make", "--data", "test.parquet", "--json"),
        *("--triggered", "triggered.parquet", "--target", 3, "--control", "weights.safetensors"),
        cwd=place,
    )
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout)
    assert set(result) == {
        *("clean_accuracy", "attack_success", "recovered_accuracy", "label_rule"),
        *("clean_model_flip_rate", "per_class"),
    }
    assert set(result["clean_accuracy"]) == {"value", "n", "low", "high"}
    assert result["clean_model_flip_rate"]["value"] > 0.9  # the "control" given here is the victim itself
    assert result["attack_success"]["n"] < 400


def test_the_record_and_the_page_repeat_the_command(place: Path) -> None:
    (place / "clean.parquet").rename(place / "my <b> & own.parquet")
    arguments = [
        *("purify", "fine-tuning+fst", *MODEL, "--clean", "my <b> & own.parquet", "--alpha=0.2"),
        *("--fine-tuning.epochs", "1", "--fst.epochs", "1", "--data", "test.parquet", "--out", "out"),
    ]
    done = run(*arguments, cwd=place)
    assert done.returncode == 1, done.stderr  # one pass is too few for a new head, which is said
    command = json.loads((place / "out" / "record.json").read_text())["command"]
    assert command == (
        "unbackdoor purify fine-tuning+fst weights.safetensors --factory net.py:make --clean "
        "'my <b> & own.parquet' --alpha=0.2 --fine-tuning.epochs 1 --fst.epochs 1 --data test.parquet "
        "--out out"
    )
    page = (place / "out" / "report.html").read_text()
    (shown,) = re.findall(r"<pre><code>(.*)</code></pre>", page)
    assert "<b>" not in shown
    assert html.unescape(shown) == command
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == ["unbackdoor", *arguments]


def test_unlabelled_examples_are_used_and_not_scored(place: Path, digits: Dataset) -> None:
    """Labels of these are not read, not even wrong ones; a method that uses none says so before anything runs."""
    _, rest = digits.split(300, seed=0)
    test, train = rest.split(400, seed=0)
    unlabelled = Dataset(items=torch.cat([test.pixels[:100], train.pixels[:200]]), labels=torch.full((300,), 77))
    write_pictures(unlabelled, place / "unlabelled.parquet")
    arguments = (*MODEL, "--clean", "clean.parquet", "--unlabelled", "unlabelled.parquet", "--out", "out")
    refused = run("purify", "fst", *arguments, cwd=place)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(
        "fst uses no --unlabelled examples. Leave them out, or take scale-invariant-fst."
    )
    assert not (place / "out").exists()
    shift = ("scale-invariant-fst", "--strength", 1, "--epochs", 2)
    done = run("purify", *shift, *arguments, "--data", "test.parquet", cwd=place)
    assert done.returncode in (0, 1), done.stderr
    record = json.loads((place / "out" / "record.json").read_text())
    assert record["unlabelled"] == 300
    assert record["scores"]["suspect"]["clean_accuracy"]["n"] == 300
    assert "100 examples are also in unlabelled.parquet; they are not scored" in done.stderr
    assert "--unlabelled unlabelled.parquet" in record["command"]
    assert " on 300 clean examples, 300 without labels in " in (place / "out" / "README.md").read_text()


def test_without_test_data_scores_are_null_and_say_why(place: Path) -> None:
    done = run("purify", "fine-tuning", *MODEL, "--clean", "clean.parquet", "--out", "out", "--epochs", 1, cwd=place)
    assert done.returncode == 0, done.stderr
    record = json.loads((place / "out" / "record.json").read_text())
    assert record["scores"] is None
    assert record["scores_note"] == "not measured: no --data was given"
    assert not (place / "out" / "report.html").exists()


def test_the_same_seed_gives_the_same_file(place: Path) -> None:
    for out in ("one", "two"):
        run("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", out, "--epochs", 2, "--seed", 4, cwd=place)
    one, two = ((place / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_examples_that_tuning_saw_are_not_scored(refused: Refusals) -> None:
    message = refused(*("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "out", "--data", "clean.parquet"))
    assert message == ("clean.parquet holds only examples of clean.parquet; scores need others. Give another --data.")


def test_examples_without_labels_do_not_replace_those_with(refused: Refusals) -> None:
    message = refused("purify", "scale-invariant-fst", *MODEL, "--unlabelled", "clean.parquet", "--out", "out")
    assert message == (
        "ScaleInvariantFST needs --clean: labelled examples of the suspect's task without a trigger. Those of "
        "--unlabelled come on top of these."
    )


def test_an_output_directory_that_exists(place: Path, refused: Refusals) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "thesis.txt").write_text("mine")
    command = ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "taken")
    assert refused(*command) == "taken exists. Use --overwrite, or another --out."
    assert refused(*command, "--overwrite") == (
        "taken was not written by unbackdoor (it has no record.json). Choose another --out."
    )
    assert (place / "taken" / "thesis.txt").read_text() == "mine"


def test_overwriting_an_earlier_result(place: Path) -> None:
    command = ("purify", "fine-tuning", *MODEL, "--clean", "clean.parquet", "--out", "out", "--epochs", 1)
    assert run(*command, cwd=place).returncode == 0
    assert run(*command, "--overwrite", "--seed", 9, cwd=place).returncode == 0
    assert json.loads((place / "out" / "record.json").read_text())["seed"] == 9
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


def test_the_model_itself_as_output(place: Path, refused: Refusals) -> None:
    run("purify", "fine-tuning", *MODEL, "--clean", "clean.parquet", "--out", "out", "--epochs", 1, cwd=place)
    message = refused(
        *("purify", "fst", "out", "--factory", "net.py:make", "--clean", "clean.parquet"),
        *("--out", "out", "--overwrite"),
    )
    assert message == "out is the input itself; --out must be another directory."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("purify", "fine-purning", "m"), "There is no purifier 'fine-purning'. Did you mean 'fine-pruning'? See"),
        (
            ("purify", "token-unlearning", "m"),
            "There is no purifier 'token-unlearning'; it is a trainer. See unbackdoor train, and unbackdoor list",
        ),
        (("train", "cleanclip"), "There is no trainer 'cleanclip'; it is a purifier. See unbackdoor purify, and unb"),
        (("attack", "\x1b[31mred"), "There is no attack '\\x1b[31mred'. See unbackdoor list attacks."),
        (("attack", "badnet"), "There is no attack 'badnet'. Did you mean 'badnets'? See unbackdoor list attacks."),
        (
            ("purify", "nowhere.module:Thing", "m"),
            "nowhere.module:Thing cannot be imported: No module named 'nowhere'.",
        ),
        (("purify", "fst"), 'Command "purify fst" parameter MODEL requires an argument. See --help.'),
        (("purify", "fst", "m", "--clean", "c", "--out", "o", "--alpha", -1), "FST.alpha must be at least 0, got -1"),
        (("purify", "fst", "m", "--clean", "c", "--out", "o", "--alpha", "x"), "FST.alpha must be a number, got x."),
        (
            ("purify", "fst", "m", "--clean", "c", "--out", "o", "--epochs", "true"),
            "FST.epochs must be a whole number, got true.",
        ),
        (("purify", "fst", "m", "--clean", "c", "--out", "o", "--alhpa", 1), "Unknown option: --alhpa. Did you mean"),
        (
            ("attack", "word", "--data", "a.csv", "--out", "o", "--words", "cf", "mn"),
            "Unused Tokens: ['mn']. An option that takes several values is given once for each of them. See --help.",
        ),
        (("evaluate", "m", "--data", "d", "--control", "m"), "--control needs --attack or --triggered"),
        (
            ("purify", "fst", "m", "--clean", "c", "--out", "o", "--control", "m", "--data", "d"),
            "--control needs --attack: it counts flips on triggered examples.",
        ),
        (("purify", "fst", "m", "--clean", "c", "--out", "o", "--attack", "a"), "--attack needs --data: test examples"),
        (("purify", "fst", "no-model", "--clean", "c", "--out", "o"), "no-model is neither a local directory nor"),
        (
            ("purify", "fst", "", "--clean", "c", "--out", "o"),
            "MODEL must be a directory, a Hub name or a weights file",
        ),
        (
            ("evaluate", *MODEL, "--data", "test.parquet", "--columns", "label=label,label=image"),
            "--columns must name each of our columns once, got label=label,label=image. Leave one out.",
        ),
        (
            ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "o\udcff"),
            "o\\udcff is not a name in UTF-8, which safetensors could write to. Choose another --out.",
        ),
        (("purify", "fst", *MODEL, "--clean", "", "--out", "o"), "The data must be a file or a folder with labelled"),
        (
            ("purify", "fst", "m", "--clean", "c", "--out", "o" * 300),
            "o" * 300 + " cannot be written (File name too long).",
        ),
        (
            ("purify", "fst", "m", "--clean", "c", "--out", "o", "--seed", 2**63),
            "--seed must be a whole number, at least 0",
        ),
        (
            ("purify", "fst", "m", "--clean", "c", "--out", ""),
            "--out must be the name of a directory, got an empty one.",
        ),
        (("demo", "image", "--out", ""), "--out must be the name of a directory, got an empty one."),
        (("attack", "none", "--data", "clean.parquet", "--out", "o", "--seed", -1), "--seed must be a whole number"),
        (
            ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "o", "--device", "meta"),
            "--device meta cannot be used here (",
        ),
        (("purify", "fst", "net.py", "--clean", "c", "--out", "o"), "net.py is not a model, which is a Hugging Face"),
        (("purify", "fst", *MODEL, "--clean", "no.parquet", "--out", "o"), "no.parquet does not exist; data is a file"),
        (
            ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "o", "--columns", "image"),
            "--columns must read OURS=NAME,OURS=NAME, as in image=img,label=fine_label, got image.",
        ),
        (
            ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "o", "--mean", "a"),
            "--mean must be numbers with commas between, got a.",
        ),
        (
            ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "o", "--std", "0"),
            "--std must be 1 or 3 numbers above 0, got 0.",
        ),
        (
            ("purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "o", "--head", "5"),
            "--head must name a linear layer of Sequential, got 5; its last ones are 1, 3.",
        ),
        (
            ("evaluate", *MODEL, "--data", "test.parquet", "--triggered", "triggered.parquet"),
            "--triggered and --target go together: the examples, and the class that the attacker wants.",
        ),
        (
            ("evaluate", *MODEL, "--data", "test.parquet", "--triggered", "triggered.parquet", "--target", 10),
            "--target must be 0 to 9, got 10.",
        ),
        (
            ("evaluate", *MODEL, "--data", "test.parquet", "--attack", "net.py"),
            "net.py is not an attack.json that unbackdoor",
        ),
        (
            ("attack", "none", "--data", "clean.parquet", "--out", "o", "--epochs", 0),
            "--epochs must be at least 1, got",
        ),
        (
            ("attack", "none", "--data", "clean.parquet", "--out", "o", "--width", 0),
            "--width must be at least 1, got 0.",
        ),
        (
            ("attack", "none", "--data", "clean.parquet", "--out", "o", "--arch", "resnet"),
            "There is no architecture 'resn",
        ),
    ],
    ids=lambda part: " ".join(map(str, part))[-60:] if isinstance(part, tuple) else "",
)
def test_bad_usage_and_input_get_one_sentence(arguments: tuple, message: str, refused: Refusals) -> None:
    assert refused(*arguments).startswith(message)


def test_ctrl_c_keeps_nothing(place: Path) -> None:
    command = [sys.executable, "-m", "unbackdoor", "purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "out"]
    process = subprocess.Popen(
        [*command, "--epochs", "1000000"],
        cwd=place,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A runner in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while "VmRSS" in (status := Path(f"/proc/{process.pid}/status").read_text()) and time.monotonic() < deadline:
        if int(status.split("VmRSS:")[1].split()[0]) > 250_000:  # torch is loaded, so it is at work
            break
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.strip().endswith("Interrupted; nothing was kept.")
    assert not (place / "out").exists()
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


STRUCK = """
import os, signal, sys
from unbackdoor.__main__ import main

number, usual, name, times = signal.Signals[sys.argv[1]], sys.argv[2] == "heeded", sys.argv[3], int(sys.argv[4])
sys.argv[1:5] = []
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    default = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
    signal.signal(each, default if usual else signal.SIG_IGN)

def strike(event, arguments):
    global times
    if event == "open" and name in str(arguments[0]) and arguments[1] != "r" and ".partial-" in str(arguments[0]):
        while times:
            times -= 1
            os.kill(os.getpid(), number)

sys.addaudithook(strike)
main()
"""
"""Sends a signal to itself, some times, as soon as a file of some name is opened to be written."""


@pytest.mark.parametrize(
    ("number", "times", "name", "command"),
    [
        ("SIGTERM", 1, "record.json", ("purify", "fine-tuning", "--epochs", 1, *MODEL, "--clean")),
        ("SIGHUP", 1, "model.safetensors", ("purify", "fine-tuning", "--epochs", 1, *MODEL, "--clean")),
        ("SIGINT", 2, "README.md", ("purify", "fine-tuning", "--epochs", 1, *MODEL, "--clean")),
        ("SIGTERM", 2, "record.json", ("attack", "badnets", "--epochs", 1, "--arch", "wrn16", "--width", 2, "--data")),
        ("SIGTERM", 1, "trigger.png", ("audit", *MODEL, "--tests", "patch", "--clean")),
        ("SIGTERM", 1, "guard.json", ("guard", "fit", "strip", *MODEL, "--clean")),
        ("SIGTERM", 1, "record.json", ("train", "plain", "--epochs", 1, "--arch", "wrn16", "--width", 2, "--data")),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else str(part),
)
def test_a_signal_while_something_is_written_leaves_nothing(
    number: str, times: int, name: str, command: tuple, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`timeout` sends its signal to the command and then to the group: the second must not strike the cleaning."""
    script = tmp_path_factory.mktemp("script") / "struck.py"
    script.write_text(STRUCK)
    before = sorted(path.name for path in place.iterdir())
    words = (*command, "clean.parquet", "--out", "new/out")
    done = run_script(script, number, "heeded", name, times, *words, cwd=place)
    assert done.returncode == 128 + signal.Signals[number], done.stderr
    said = "Interrupted" if number == "SIGINT" else f"Ended by {number}"
    assert done.stderr.splitlines()[-1] == f"{said}; nothing was kept."
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_signal_while_a_side_file_is_written(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("script") / "struck.py"
    script.write_text(STRUCK)
    words = ("audit", *MODEL, "--tests", "margin", "--sarif", "found.sarif", "--clean", "clean.parquet", "--out", "out")
    done = run_script(script, "SIGTERM", "heeded", ".found.sarif", 1, *words, cwd=place)
    assert done.returncode == 143, done.stderr
    assert [path.name for path in place.iterdir() if not path.is_symlink()] in (["out"], [])  # complete, or not there
    assert not (place / "out").exists() or (place / "out/audit.json").is_file()


def test_a_signal_that_is_ignored_stays_ignored(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of `nohup`, and of a shell that runs a command in the background."""
    script = tmp_path_factory.mktemp("script") / "struck.py"
    script.write_text(STRUCK)
    words = ("purify", "fine-tuning", "--epochs", 1, *MODEL, "--clean", "clean.parquet", "--out", "out")
    done = run_script(script, "SIGHUP", "ignored", "record.json", 1, *words, cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "out/record.json").is_file()


def test_a_signal_while_a_directory_gets_its_name_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an empty directory would stay, or the earlier one aside."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = os.rename

    def struck(*names: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        rename(*names)

    monkeypatch.setattr(os, "rename", struck)
    with pytest.raises(KeyboardInterrupt), heeded() as heard, directory(out, content(out)) as folder:
        (folder / "new").write_text("new")
    assert heard == [signal.SIGTERM]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]


def test_ctrl_c_while_importing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "unbackdoor._cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "unbackdoor._cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        unbackdoor.__main__.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "Interrupted; nothing was kept.\n"


@pytest.mark.parametrize(
    "work",
    [
        "exec('raise KeyboardInterrupt')",  # CPython would exit by the signal
        "os.kill(os.getpid(), signal.SIGINT)",
        "\n    try: os.kill(os.getpid(), signal.SIGINT)\n    except BaseException: raise ImportError('what?')",
        "\n    try: os.kill(os.getpid(), signal.SIGINT)\n    except BaseException: raise UnbackdoorError('what?')",
    ],
)
def test_ctrl_c_wherever_it_strikes(work: str) -> None:
    script = (
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from unbackdoor import UnbackdoorError\ndef work(*_):\n    {work}\n"
        "import unbackdoor._cli.app\nunbackdoor._cli.app.parser = work\n"
        "from unbackdoor.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "Interrupted; nothing was kept.\n")


def test_an_error_that_no_interrupt_caused_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbackdoor._cli.app.main", lambda: [].pop())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(IndexError):
        unbackdoor.__main__.main()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "unbackdoor", "list", "attacks"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "problem",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes.")],
    ids=["python", "torch"],
)
def test_too_little_memory(
    problem: Exception, refused: Refusals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("unbackdoor._cli.commands.evaluate.evaluate", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "m", "--data", "d"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("Out of memory; nothing was kept. Take a smaller")


def test_a_full_disk_keeps_nothing(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernel refuses to let any file grow past 4 kB, which is what a full disk looks like from inside (EFBIG)."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from unbackdoor._cli.app import main; import unbackdoor._cli.commands.purify as command;"
        "purify = command.purify_model;\n"
        "def limit(*a, **k):\n"
        "    made = purify(*a, **k); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); return made\n"
        "command.purify_model = limit\n"
        "main(sys.argv[1:])"
    )
    arguments = ["purify", "fst", *MODEL, "--clean", "clean.parquet", "--out", "out", "--epochs", "1"]
    script = tmp_path_factory.mktemp("limited") / "script.py"
    script.write_text(limited)
    done = run_script(script, *arguments, cwd=place)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "out could not be written" in done.stderr
    assert not (place / "out").exists()
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


def test_hostile_class_names_appear_as_text(place: Path, digits: Dataset) -> None:
    names = ["<script>alert(1)</script>", *list("abcdefghi")]
    clean, test = digits.split(300, seed=0)
    for data, name in ((clean, "c.parquet"), (test, "t.parquet")):
        write_pictures(replace(data, classes=tuple(names)), place / name)
    arguments = ("purify", "fine-tuning", *MODEL, "--clean", "c.parquet", "--out", "out", "--data", "t.parquet")
    done = run(*arguments, "--epochs", 1, cwd=place)
    assert done.returncode == 0, done.stderr
    page = (place / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_lists_name_every_entry(place: Path) -> None:
    for what, registry in (("methods", purifiers.REGISTRY), ("attacks", attacks.REGISTRY)):
        shown = run("list", what, cwd=place)
        assert shown.returncode == 0
        for entry in registry:
            assert entry.name in shown.stdout


def test_the_clean_twin_serves_every_kind_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["list", "attacks"])
    facts = capsys.readouterr().out.partition("\nnone ")[2].splitlines()[1]
    assert facts.strip() == "images, text, conversations, image-text"


def test_list_without_a_word_names_what_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["list"])
    assert stopped.value.code == 0
    blocks = re.findall(r"^(\w+) \(more: unbackdoor list \1\)\n((?:  .+\n)+)", capsys.readouterr().out, re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["methods", "attacks", "archs", "detectors", "guards", "trainers"]
    registries = (each.REGISTRY for each in (purifiers, attacks, archs, detectors, guards, trainers))
    for (_, names), registry in zip(blocks, registries, strict=True):
        named = " ".join(names.split()).split(", ")
        assert named[: len(registry)] == [entry.name for entry in registry]


def write_attack(folder: Path) -> None:
    """The attack.json of the victim in the workspace."""
    folder.mkdir()
    data = Dataset(items=torch.zeros(10, 1, 8, 8, dtype=torch.uint8), labels=torch.arange(10))
    poisoned = poison(data, attacks.BadNets(target=3), rate=0.5, seed=0, classes=10)
    save_trigger(folder, describe(poisoned, rate=0.5, seed=0, implanted=True), poisoned.trigger.arrays)


STRESS = ("stress", *MODEL, "--victim", "weights.safetensors", "--clean", "clean.parquet")


def test_stress_as_a_user_runs_it(place: Path) -> None:
    write_attack(place / "attack")
    arguments = (*STRESS, "--attack", "attack/attack.json", "--data", "test.parquet", "--parts", "retune,path")
    done = run(*arguments, "--k", "1,2", "--out", "stressed", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    written = json.loads((place / "stressed" / "stress.json").read_text())
    assert written.pop("files") == ["stress.html", "stress.json"]
    assert content == written
    assert str(place) not in done.stdout
    assert (content["model"], content["victim"], content["control"]) == ("weights.safetensors",) * 2 + (None,)
    assert [each["k"] for each in content["retuning"]["purified"]["runs"]] == [1, 2]
    assert content["before"]["victim"]["attack_success"]["value"] > 0.9
    assert content["notes"][0].startswith("No control")
    assert "have the same weights, so nothing was purified" in done.stderr
    assert "<svg" in (place / "stressed" / "stress.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*STRESS, "--attack", "no.json"), "no.json does not exist; --attack takes the attack.json"),
        ((*STRESS, "--attack", "control.json"), "control.json belongs to a clean control, which has no trigger."),
        ((*STRESS, "--attack", "attack", "--k", "a,b"), "--k must be whole numbers of at least 1 with commas between,"),
        ((*STRESS, "--attack", "attack", "--parts", "all"), "--parts must name some of retune, reactivation, path,"),
        ((*STRESS, "--attack", "attack", "--out", "attack"), "attack is the input itself; --out must be another"),
        ((*STRESS, "--attack", "attack", "--data", "clean.parquet"), "clean.parquet holds only examples of clean.pa"),
        ((*STRESS, "--attack", "attack", "--control", "no.safetensors"), "no.safetensors"),
    ],
    ids=lambda part: " ".join(map(str, part))[-40:] if isinstance(part, tuple) else "",
)
def test_what_stress_refuses(arguments: tuple, message: str, place: Path, refused: Refusals) -> None:
    write_attack(place / "attack")
    control = {"format": 1, "attack": {"name": "none", "parameters": {}}, "implanted": None}
    control |= {"trigger": {"file": "t", "sha256": ""}}
    (place / "control.json").write_text(json.dumps(control))
    assert refused(*arguments).startswith(message)
