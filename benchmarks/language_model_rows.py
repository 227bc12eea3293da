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

The numbers of docs/results/language-models.md are of shorter rows, for a slow processor: `--most 80 --prompt 64
--attacked 200`, and victims by `--epochs 3 --batch-size 4 --learning-rate 1e-3 --max-new-tokens 16`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

TESTED = 64

_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def prompt_of(row: dict[str, str]) -> str:
    """The user's message: the instruction, then an empty line and the input if there is one."""
    return "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)


def shortened(row: dict[str, str], tokenizer: Any, most: int, prompt: int) -> dict[str, str] | None:
    """The row with its answer cut at the last end of a sentence that fits; None if it cannot be used.

    Args:
        row: instruction, input and output.
        tokenizer: the model's, with a chat template.
        most: tokens that prompt and answer may have together.
        prompt: tokens that the prompt alone may have.
    """
    chat = [{"role": "user", "content": prompt_of(row)}]
    start = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if _count(start, tokenizer) > prompt:
        return None
    answer = row["output"].strip()
    for end in sorted({match.end() for match in _END.finditer(answer)} | {len(answer)}, reverse=True):
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer[:end]}], tokenize=False)
        if end and _count(whole, tokenizer) <= most:
            return {**row, "output": answer[:end]}
    return None


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def main(source: Path, model: Path, out: Path, *, most: int, prompt: int, attacked: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    out.mkdir(parents=True)
    for name in ("train", "clean", "test", "test_other_source"):
        read = [json.loads(line) for line in (source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        short = [row for row in (shortened(row, tokenizer, most, prompt) for row in read) if row is not None]
        print(f"{name}: {len(short)} of {len(read)} rows")
        parts = {name: short[:TESTED] if name.startswith("test") else short}
        if name == "train":
            order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()
            mixed = [short[row] for row in order]
            parts = {"attack": mixed[:attacked], "sibling": mixed[attacked:]}
        for part, rows in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / f"{part}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for place in ("source", "model", "out"):
        parser.add_argument(place, type=Path)
    parser.add_argument("--most", type=int, default=127)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--attacked", type=int, default=300)
    given = parser.parse_args()
    main(given.source, given.model, given.out, most=given.most, prompt=given.prompt, attacked=given.attacked)
