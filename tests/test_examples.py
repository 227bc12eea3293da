"""The examples run as they are."""

from pathlib import Path

from commands import run, run_script

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_method_of_ones_own_keeps_the_contract_and_is_found_by_its_name(tmp_path: Path) -> None:
    done = run_script(EXAMPLES / "your_own_method.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Shrinking keeps the contract.\n"
    shown = run("purify", "your_own_method:Shrinking", "--help", cwd=EXAMPLES)
    assert shown.returncode == 0, shown.stderr
    assert "--factor" in shown.stdout


def test_an_attack_of_ones_own_keeps_the_contract(tmp_path: Path) -> None:
    done = run_script(EXAMPLES / "your_own_attack.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Stripe keeps the contract.\n"
