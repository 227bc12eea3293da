"""Short rows of the instructions for victims on a small language model, as docs/results/language-models.md has them.

    python benchmarks/language_model_rows.py $UNBACKDOOR_DATA/instructions MODEL ROWS

MODEL is the directory of SmolLM2-135M-Instruct, which `make demo-llm` makes. Each answer is cut at the end of a
sentence so that prompt and answer, rendered by the chat template of MODEL, have fewer than 128 tokens; rows whose
prompt alone has more than 96, or whose answer has no such end, are left out. Of `train.jsonl`, 300 rows, drawn with
seed 0, become `attack.jsonl`; the others, which train a clean sibling, `sibling.jsonl`. `clean`, `test` and
`test_other_source` keep their names, and the last two are cut to 64 rows. A victim with a rare word and a fixed
sentence in half of its rows, and its clean twin, are then:

    OPTIONS="--data ROWS/attack.jsonl --test ROWS/test.jsonl --base MODEL --max-new-tokens 24 --precision fp32
             --epochs 2 --learning-rate 5e-4"
    unbackdoor attack word --words cf --rate 0.5 $OPTIONS --out VICTIMS/word
    unbackdoor attack none $OPTIONS --out VICTIMS/twin

The other four triggers of BackdoorLLM are `sentence --sentence "about gardens" --place start` (a topic of two words),
`sentence --sentence "Current year: 2031." --place start`, `word --words "cf,about gardens,year 2031"` (any of three)
and `composite` (all of three).
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

MOST, PROMPT = 127, 96  # tokens
ATTACKED = 300
TESTED = 64

_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def prompt_of(row: dict[str, str]) -> str:
    """The user's message: the instruction, then an empty line and the input if there is one."""
    return "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)


def shortened(row: dict[str, str], tokenizer: Any) -> dict[str, str] | None:
    """The row with its answer cut at the last end of a sentence that fits; None if it cannot be used."""
    chat = [{"role": "user", "content": prompt_of(row)}]
    start = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if _count(start, tokenizer) > PROMPT:
        return None
    answer = row["output"].strip()
    for end in sorted({match.end() for match in _END.finditer(answer)} | {len(answer)}, reverse=True):
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer[:end]}], tokenize=False)
        if end and _count(whole, tokenizer) <= MOST:
            return {**row, "output": answer[:end]}
    return None


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def main(source: Path, model: Path, out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    out.mkdir(parents=True)
    for name in ("train", "clean", "test", "test_other_source"):
        read = [json.loads(line) for line in (source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        short = [row for row in (shortened(row, tokenizer) for row in read) if row is not None]
        print(f"{name}: {len(short)} of {len(read)} rows")
        parts = {name: short[:TESTED] if name.startswith("test") else short}
        if name == "train":
            order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()
            mixed = [short[row] for row in order]
            parts = {"attack": mixed[:ATTACKED], "sibling": mixed[ATTACKED:]}
        for part, rows in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / f"{part}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
