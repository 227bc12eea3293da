"""The examples run as they are."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_method_of_ones_own_keeps_the_contract_and_is_found_by_its_name(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "your_own_method.py")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "Shrinking keeps the contract.\n"
    arguments = ["purify", "your_own_method:Shrinking", "--help"]
    shown = subprocess.run(
        [sys.executable, "-m", "unbackdoor", *arguments], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    assert "--factor" in shown.stdout


def test_an_attack_of_ones_own_keeps_the_contract() -> None:
    run = subprocess.run([sys.executable, str(EXAMPLES / "your_own_attack.py")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "Stripe keeps the contract.\n"
