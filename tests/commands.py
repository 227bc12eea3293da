"""Running the command line or a script from tests: in a process of its own, or here where it must fail."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from unbackdoor._cli.app import main

# Imported once, which takes longer than most commands: each command is then a process forked from this one.
_IMPORTED = """
import gc, json, os, runpy, sys

import datasets, peft, pyarrow.parquet, torch, torch._dynamo
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM
from unbackdoor import archs
from unbackdoor.__main__ import main
from unbackdoor._cli.commands import attack, audit, evaluate, guard, purify, stress, train

archs.register()  # imports what the first model would
gc.freeze()  # else each process goes through all of it, and copies it

for line in sys.stdin:
    command = json.loads(line)
    process = os.fork()
    if not process:
        streams = (os.devnull, command["out"], command["err"])
        for number, path in enumerate(streams):
            os.dup2(os.open(path, os.O_RDWR), number)
        os.chdir(command["cwd"])
        os.environ.update(command["environment"])
        sys.argv = command["arguments"]
        if sys.argv[0] == "unbackdoor":
            main()
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@functools.cache
def _imported() -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", _IMPORTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    atexit.register(started.communicate)  # which closes its stdin, and so ends it
    return started


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in a folder."""
    return run_script("unbackdoor", *arguments, cwd=cwd)


def run_script(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script, by its file, with arguments in a process of its own, in a folder."""
    words = [*map(str, arguments)]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = {"arguments": words, "cwd": str(cwd), "out": out.name, "err": err.name, "environment": environment}
        process = _imported()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(command), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


@dataclass(frozen=True)
class Refusals:
    """Runs commands that must fail, in this process."""

    folder: Path
    output: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object, code: int = 2) -> str:
        """One sentence or two on stderr, no traceback, the exit code, nothing written; returns what was said."""
        before = sorted(path.name for path in self.folder.iterdir())
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        out, err = self.output.readouterr()
        assert stopped.value.code == code
        assert "Traceback" not in err
        assert out == ""
        assert sorted(path.name for path in self.folder.iterdir()) == before
        said = [line for line in err.splitlines() if not line.startswith(("note: ", "warning: ", "tuning: "))]
        assert len(said) == 1, said
        # The reader of models cannot know which command runs, and names --factory to all.
        assert not re.search(r"\(unbackdoor \w+ has no --(?!factory)", err), "it advises options that the command lacks"
        return said[0]
