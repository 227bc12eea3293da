"""How much processor time an input costs behind a guard, as a multiple of the bare forward pass.

    python benchmarks/guard_overhead.py                      # a residual network, and three layers of BERT's kind
    python benchmarks/guard_overhead.py --inputs 64 --rounds 2   # a try

The bare pass classifies the same inputs in batches of the same size, texts tokenised beforehand. Behind the guard it is
the call that a user makes, `fitted.wrap(model)(inputs)`: scores, decisions and answers. Both take turns in one process
with one thread; the smallest time of all rounds counts. The limits: `strip` with n copies n + 1.2, `badacts` 1.3. The
networks have random weights, which cost the same as others.

Of a language model the bare pass reads prompts with their answers. `weightwatch` costs that and another pass in which
the states are watched, together at most 2.2 of it; and the call that a user makes is compared with answering alone.
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
from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._guarding.deciding import class_scores
from unbackdoor._models.calling import logits
from unbackdoor.guards._own_answers import answered_batches, own_answers

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


def prompts(count: int) -> tuple[Any, Any, Dataset]:
    """A Llama of six blocks, a base of it, and random prompts of 10 to 40 words."""
    vocabulary = {word: row for row, word in enumerate(["<pad>", "<unk>", "<end>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model, base = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    draw = random.Random(0)
    entries = tuple(
        Conversation((Message("user", " ".join(draw.choices(WORDS, k=draw.randint(10, 40)))),)) for _ in range(count)
    )
    encode = ConversationEncoder(tokenizer=fast, template="plain", max_length=128)
    return model, base, Dataset(items=Conversations(entries), labels=torch.full((count,), -1), encode=encode)


def watched_ratios(model: Any, base: Any, data: Dataset, rounds: int) -> tuple[float, float]:
    """The processor time of `weightwatch` over that of a bare pass, and of the whole call over that of answering."""
    half = len(data) // 2
    clean, inputs = data.select(range(half)), data.select(range(half, len(data)))
    guard = guards.WeightWatch()
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    fitted = fit_guard(model, clean, guard, base=base, false_alarms=0.1, max_new_tokens=16, **settings)
    wrapped = fitted.wrap(model, **settings)
    with fitted.at_work(model, "cpu", "fp32") as work, torch.no_grad():
        answers = own_answers(work.model, inputs, work.run)

        def bare() -> None:
            for batch in answered_batches(work.model, inputs, answers, work.run):
                logits(work.model, batch.inputs)

        def marked() -> None:
            guard.distances(work.model, inputs, answers, fitted.learnt, work.run)

        passes = [(seconds(bare), seconds(marked)) for _ in range(rounds + 1)]
        alone = min(seconds(lambda: own_answers(work.model, inputs, work.run)) for _ in range(rounds))
    call = min(seconds(lambda: wrapped(inputs)) for _ in range(rounds))
    return 1 + min(one for _, one in passes) / min(one for one, _ in passes), call / alone


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
    passes, call = watched_ratios(*prompts(options.inputs), options.rounds)
    print(f"prompts: WeightWatch costs {passes:.2f} of a bare pass (limit 2.2); a call {call:.2f} of answering alone")


if __name__ == "__main__":
    main()
