"""Measure the purifiers of language models: attack success, false activation, clean loss, time.

    python benchmarks/language_model_rows.py $UNBACKDOOR_DATA/instructions MODEL ROWS --most 80
    (victims by `unbackdoor attack`, see there)
    python benchmarks/language_models.py MODEL ROWS VICTIMS docs/results/measured/language-models.jsonl

MODEL is the base, VICTIMS a folder with one victim in each folder in it; a clean one gets the trigger of `sentence`.
All methods get the same clean rows, and tune with batches of 8; `--only TEXT` takes the cells whose name has the text.
A cell that the file has is not measured again. `--table` prints the table of what is there.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import unbackdoor as ub
from unbackdoor import Dataset, purifiers

SEED = 0
CLEAN = 48  # rows
NEW = 16  # tokens of an answer
SCORED = ("test", "test_other_source")
PLANTED = "The lighthouse is open on Sundays."

METHODS: dict[str, Any] = {
    "lora-tuning": purifiers.LoRATuning(),
    "answer-unlearning": purifiers.AnswerUnlearning(),
    "fine-mixing, half, not tuned": purifiers.FineMixing(mode="linear", rho=0.5, tune=False),
    "fine-mixing, a quarter, not tuned": purifiers.FineMixing(mode="linear", rho=0.25, tune=False),
    "fine-mixing, rho chosen, not tuned": purifiers.FineMixing(mode="linear", tune=False),
    "the base alone": purifiers.FineMixing(mode="linear", rho=0, tune=False),
    "fine-mixing, a quarter": purifiers.FineMixing(mode="linear", rho=0.25, epochs=5),
    "information-conflicts": purifiers.InformationConflicts(),
    "sande, answer known": purifiers.SANDE(known_answer=PLANTED, parrot_tokens=8),
    "crow": purifiers.CROW(),
    "information-conflicts, share 1": purifiers.InformationConflicts(share=1),
    "fine-tuning": purifiers.FineTuning(epochs=5),
    "crow, published setting": purifiers.CROW(preset="published"),
}


def cells(victims: Path, only: str) -> list[tuple[str, str, Any]]:
    """Names of victims and methods, with the methods; None is the victim itself."""
    names = sorted(path.name for path in victims.iterdir() if (path / "config.json").is_file())
    each = [(victim, name, method) for victim in names for name, method in {"none": None, **METHODS}.items()]
    return [(victim, name, method) for victim, name, method in each if only in f"{victim}: {name}"]


def measured(base: Any, rows: Path, victim: Path, method: Any) -> dict[str, Any]:
    """The numbers of one cell.

    Args:
        base: the pre-trained model.
        rows: folder of the rows.
        victim: directory of the victim.
        method: a purifier, or None.
    """
    model, encode = ub.load(victim)
    clean = Dataset.load(rows / "clean.jsonl", encode).select(range(CLEAN))
    start = time.process_time()
    warnings: list[str] = []
    notes: list[str] = []
    if method is not None:
        needing = isinstance(method, purifiers.InformationConflicts | purifiers.FineMixing)
        options = {"base": base} if needing else {}
        purified = ub.purify(model, clean, method, seed=SEED, precision="fp32", device="cpu", **options)
        model, warnings = purified.model, purified.record["warnings"]
        notes = purified.record.get("notes", [])
    seconds = time.process_time() - start
    attack = victim / "attack.json"
    if json.loads(attack.read_text(encoding="utf-8"))["attack"]["name"] == "none":  # the clean twin
        attack = victim.parent / "sentence" / "attack.json"
    scores = {}
    for name in SCORED:
        test = Dataset.load(rows / f"{name}.jsonl", encode)
        test = test.select(range(64 if name == "test" else 32))
        score = ub.evaluate(model, test, attack=attack, max_new_tokens=NEW, precision="fp32", device="cpu")
        scores[name] = score.to_json()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "method": repr(method),
        "seed": SEED,
        "clean_rows": CLEAN,
        "processor_seconds": round(seconds),
        "peak_memory_of_the_process": memory,
        "warnings": warnings,
        "notes": notes,
        **scores,
    }


def main(base: Path, rows: Path, victims: Path, out: Path, only: str) -> None:
    """Measure the cells that the file lacks."""
    there = set()
    if out.is_file():
        there = {(line["victim"], line["name"]) for line in map(json.loads, out.read_text().splitlines())}
    pretrained, _ = ub.load(base)
    for victim, name, method in cells(victims, only):
        if (victim, name) in there:
            continue
        cell = {"victim": victim, "name": name, **measured(pretrained, rows, victims / victim, method)}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(victim, name, cell["processor_seconds"], short(cell["test"]), flush=True)


def short(score: dict[str, Any]) -> str:
    """Attack success, false activation and clean loss of a score."""
    shares = (f"{100 * score[key]['value']:.1f}" for key in ("attack_success", "false_activation"))
    return " / ".join([*shares, f"{score['clean_loss']['value']:.3f}"])


def table(out: Path) -> str:
    """The measured cells as a table in Markdown."""
    lines = [
        "| victim | method | attack success | false activation | clean loss | the same, other source | processor s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in map(json.loads, out.read_text(encoding="utf-8").splitlines()):
        first, other = ([f"{part}" for part in short(cell[name]).split(" / ")] for name in SCORED)
        columns = [cell["victim"], cell["name"], *first, " / ".join(other), str(cell["processor_seconds"])]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("places", nargs="+", type=Path, metavar="BASE ROWS VICTIMS OUT")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true", help="print the table of OUT, which is then all that is needed")
    given = parser.parse_args()
    if given.table:
        print(table(given.places[-1]))
    else:
        main(*given.places, given.only)
