"""Processor time of a step of CROW, next to a plain LoRA step and to a bare loop with as many passes.

    python benchmarks/crow_speed.py
    python benchmarks/crow_speed.py --layers 30 --width 576 --vocabulary 49152     # the size of SmolLM2-135M

The model is a Llama with random weights. All three take steps of 4 x 128 tokens with LoRA of rank 8 next to all linear
layers of the blocks, and take turns. The bare loop is written with transformers and torch alone: it keeps the hidden
states that transformers returns, and computes the same loss.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import purifiers
from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.dataset import Batch
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.decoder_blocks import decoder_blocks
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation
from unbackdoor._training.lora import adapted
from unbackdoor.purifiers._consistency import Stack

AIMS = {"crow to lora": 3.0, "crow to bare": 1.1}
EPSILON, ALPHA = 0.1, 5.5


def model_of(layers: int, width: int, vocabulary: int) -> nn.Module:
    """A random Llama with LoRA, in train mode."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 192, 1),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    adapted(model, rank=8, seed=0)
    return model.train()


def bare(model: Any, inputs: AnswerTokens) -> None:
    """Fill the gradients of one step of CROW with transformers and torch alone."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    weights = mask / mask.sum()

    def turned(embedded: Tensor) -> Tensor:
        states = model.model(
            inputs_embeds=embedded, attention_mask=mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        pairs = itertools.pairwise(states[1:-1])
        return torch.stack(
            [(weights * (1 - F.cosine_similarity(now, after, dim=-1, eps=1e-8))).sum() for now, after in pairs]
        ).mean()

    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = inputs.targets[:, 1:]
    F.cross_entropy(scores[targets != UNSCORED], targets[targets != UNSCORED]).backward()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    (slope,) = torch.autograd.grad(turned(embedded), embedded)
    (ALPHA * turned(embedded.detach() + EPSILON * slope.sign() * mask[..., None])).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(options.layers, options.width, options.vocabulary)
    ids = torch.randint(options.vocabulary, (4, 128))
    targets = ids.clone()
    targets[:, :64] = UNSCORED
    inputs = AnswerTokens({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets)
    batch = Batch(inputs, torch.full((4,), -1), torch.arange(4))
    run = Run(
        generator=torch.Generator().manual_seed(0),
        arithmetic=choose(model, "cpu", "fp32"),
        head_name="lm_head",
        modality="conversations",
        task=Generation(),
    )
    crow = purifiers.CROW(epsilon=EPSILON, unit="absolute", alpha=ALPHA)
    stack = Stack(model, decoder_blocks(model, crow, least=3), run.arithmetic)
    steps: dict[str, Callable[[], object]] = {
        "lora": lambda: run.task.loss(run.scores(model, inputs), batch).backward(),
        "crow": lambda: crow.fill(model, stack, batch, run),
        "bare": lambda: bare(model, inputs),
    }
    gradients: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        order = list(steps)[number % 3 :] + list(steps)[: number % 3]
        for name in order:
            model.zero_grad()
            start = time.process_time()
            steps[name]()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
            gradients[name] = {
                key: copy.copy(each.grad) for key, each in model.named_parameters() if each.grad is not None
            }
    for key, gradient in gradients["bare"].items():
        assert torch.allclose(gradients["crow"][key], gradient, rtol=1e-3, atol=1e-6), key
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    print("| step | seconds of one core, median | least | most |")
    print("| --- | --- | --- | --- |")
    for name, taken in seconds.items():
        print(f"| {name} | {middle[name]:.2f} | {min(taken):.2f} | {max(taken):.2f} |")
    for what, aim in AIMS.items():
        mine, _, other = what.partition(" to ")
        print(f"{what}: {middle[mine] / middle[other]:.2f} (aim: at most {aim:.1f})")


if __name__ == "__main__":
    main()
