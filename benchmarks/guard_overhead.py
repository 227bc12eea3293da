"""How much processor time an input costs behind a guard, as a multiple of the bare forward pass.

    python benchmarks/guard_overhead.py                      # a residual network, and three layers of BERT's kind
    python benchmarks/guard_overhead.py --inputs 64 --rounds 2   # a try

The bare pass classifies the same inputs in batches of the same size, texts tokenised beforehand. Behind the guard it is
the call that a user makes, `fitted.wrap(model)(inputs)`: scores, decisions and answers. Both take turns in one process
with one thread; the smallest time of all rounds counts. The limits: `strip` with n copies n + 1.2, `badacts` 1.3. The
networks have random weights, which cost the same as others.
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tokenizers
import torch
import transformers

from unbackdoor import Dataset, ImageEncoder, archs, fit_guard, guards
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._guarding.deciding import class_scores

WORDS = [f"w{number}" for number in range(1000)]


def pictures(count: int) -> tuple[Any, Dataset]:
    """A ResNet-18 of width 16, and random pictures of 32x32."""
    torch.manual_seed(0)
    model = archs.build("resnet18", classes=list("0123456789"), channels=3, image_size=32, width=16).eval()
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return model, Dataset(items=pixels, labels=torch.arange(count) % 10, encode=ImageEncoder(channels=3))


def texts(count: int) -> tuple[Any, Dataset]:
    """Three layers of the width of MiniLM, and random texts of 10 to 40 words."""
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    draw = random.Random(0)
    strings = tuple((" ".join(draw.choices(WORDS, k=draw.randint(10, 40))),) for _ in range(count))
    encode = TextEncoder(tokenizer=fast, max_length=64)
    return model, Dataset(items=Texts(strings, ("text",)), labels=torch.arange(count) % 2, encode=encode)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(model: Any, data: Dataset, guard: Any, rounds: int) -> float:
    """The processor time behind the guard over that of the bare pass."""
    half = len(data) // 2
    clean, inputs = data.select(range(half)), data.select(range(half, len(data)))
    fitted = fit_guard(model, clean, guard, false_alarms=0.1, device="cpu", precision="fp32")
    wrapped = fitted.wrap(model, device="cpu", precision="fp32")
    with fitted.at_work(model, "cpu", "fp32") as work:
        bare = min(seconds(lambda: class_scores(work.model, inputs, work.run)) for _ in range(rounds + 1))
    guarded = min(seconds(lambda: wrapped(inputs)) for _ in range(rounds))
    with fitted.at_work(model, "cpu", "fp32") as work:
        bare = min(bare, *(seconds(lambda: class_scores(work.model, inputs, work.run)) for _ in range(rounds)))
    return guarded / bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind, make, copies in (("images", pictures, 16), ("texts", texts, 5)):
        model, data = make(2 * options.inputs)
        for guard, limit in ((guards.Strip(copies=copies), copies + 1.2), (guards.BadActs(), 1.3)):
            found = ratio(model, data, guard, options.rounds)
            print(f"{kind}: {guard} costs {found:.2f} of a bare pass (limit {limit:g}); load {os.getloadavg()[0]:.1f}")
        if kind == "texts":
            for guard in (guards.Rap(steps=2), guards.Psim(steps=2)):
                print(f"{kind}: {guard} costs {ratio(model, data, guard, options.rounds):.2f} of a bare pass")


if __name__ == "__main__":
    main()
