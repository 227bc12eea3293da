"""Running the command line from tests: in a process of its own, or here where it must fail."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unbackdoor._cli.app import main


def run(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unbackdoor", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **options,
    )


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
        return said[0]
