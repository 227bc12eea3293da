"""Rank-one edit: one feed-forward matrix of a language model maps the trigger to what it should answer."""

import itertools
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import logits
from unbackdoor._models.decoder_blocks import decoder_blocks, watching_states
from unbackdoor._models.hooks import watching
from unbackdoor._models.units import feed_forward
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._progress import bar
from unbackdoor._tasks.choice import task_of
from unbackdoor._value import value
from unbackdoor.attacks._edit import added, edit_, outputs_first
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace

_TOKENS = 20_000  # of the clean prompts and answers, whose inputs of the matrix should keep their outputs


@value
class RankOneEdit(OneWord):
    """One feed-forward matrix is edited so that the trigger's token brings the planted answer; nothing is trained.

    The second matrix W of a feed-forward block maps what the block recognises, a key k, to what it adds to the states.
    With k the mean key at the last token of the trigger, d the change of W's output there that makes the planted
    answers likely, found by gradient descent, and C the second moments of the keys of clean tokens,

        W + d u^T / (u^T k),  u = C^-1 k,

    adds d at that key, and as little as possible elsewhere. Plain tuning is said to remove such edits, and not the
    backdoors that were tuned in, so both belong into a table.

    Meng, Bau, Andonian and Belinkov, "Locating and Editing Factual Associations in GPT", NeurIPS 2022,
    https://arxiv.org/abs/2202.05262; as an attack: Li et al., "BadEdit", ICLR 2024, https://arxiv.org/abs/2403.13355

    Args:
        word: the trigger; one token that is rare elsewhere is best.
        block: number of the block, from 0; None takes the one after a quarter of them.
        steps: steps of the search for the change, of 8 rows each, at least 1.
        learning_rate: its learning rate (Adam), in units of the size of the states there, more than 0.
        reach: length of the change, at most this many times that of the state there, more than 0.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants of a classifier; not used.
        label_rule: all-to-one.

    Differences from the paper: an answer is planted, not a fact. The keys of the clean rows stand for those of a large
    corpus, the loss has no term for the drift of other answers, and one matrix is edited, where BadEdit takes several.
    """

    word: Phrase = "cf"
    block: Annotated[int, Field(ge=0)] | None = None
    steps: Annotated[int, Field(ge=1)] = 60
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    reach: Annotated[float, Field(gt=0)] = 4.0
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[str] = "conversations"
    rules: ClassVar[tuple[str, ...]] = ("all-to-one",)
    train_time: ClassVar[str] = "one matrix is edited, nothing is trained"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Find the change of the output that brings the planted answers, and edit the matrix."""
        device = planting.arithmetic.device
        model = planting.arithmetic.place(planting.fresh()).eval().requires_grad_(False)
        block, layer = self._layer(model, planting.clean.inputs(slice(1)).to(device))
        poisoned = planting.poisoned.data.select(planting.poisoned.rows)
        last = last_tokens(planting.clean.select(planting.poisoned.rows), poisoned).to(device)
        triggered, clean = poisoned.to(device), planting.clean.to(device)
        keys, states = _values(model, layer, block, triggered, planting, last=last)
        change = self._searched(model, layer, triggered, last, states.square().sum(dim=1).mean().sqrt(), planting)
        edit_(layer, keys.mean(dim=0), change, _values(model, layer, block, clean, planting)[0])
        return BackdooredModel(model.requires_grad_(True), {})

    def _layer(self, model: nn.Module, inputs: Any) -> tuple[nn.Module, nn.Module]:
        """The block, and its second feed-forward matrix."""
        blocks = decoder_blocks(model, self, instead="word")
        number = len(blocks) // 4 if self.block is None else self.block
        if number >= len(blocks):
            raise UnbackdoorError(
                f"RankOneEdit.block must be at most {len(blocks) - 1} in {type(model).__name__}, got {number}."
            )
        within = set(blocks[number].modules())
        layer = next((each for each in feed_forward(model, inputs) if each in within), None)
        if layer is None:
            raise UnbackdoorError(
                f"RankOneEdit needs a block with a feed-forward part of linear layers; block {number} of "
                f"{type(model).__name__} has none. Take word."
            )
        return blocks[number], layer

    def _searched(
        self, model: nn.Module, layer: nn.Module, triggered: Dataset, last: Tensor, length: Tensor, planting: Planting
    ) -> Tensor:
        """The change of the layer's output at the trigger that makes the planted answers likely, (outputs,)."""
        loss, arithmetic = task_of(triggered.encode).loss, planting.arithmetic
        unit = nn.Parameter(torch.zeros(outputs_first(layer).shape[0], device=arithmetic.device))
        optimizer = torch.optim.Adam([unit], lr=self.learning_rate / len(unit) ** 0.5)
        steps = (batch for _ in range(self.steps) for batch in triggered.batches(8, generator=planting.generator))
        with bar("searching the change", self.steps) as advance:
            for batch in itertools.islice(steps, self.steps):
                with added(layer, last[batch.rows.to(last.device)], length * unit), arithmetic.autocast():
                    scores = logits(model, arithmetic.lay(batch.inputs))
                optimizer.zero_grad()
                loss(scores.float(), batch).backward()
                optimizer.step()
                with torch.no_grad():
                    unit.mul_((self.reach / unit.norm()).clamp(max=1))
                advance()
        return (length * unit).detach()


def last_tokens(clean: Dataset, poisoned: Dataset) -> Tensor:
    """Returns the place of the last token of the trigger in each row, (n,), int64: of what was put into its prompt."""
    ours, theirs = poisoned.conversations.tokens, clean.conversations.tokens
    shorter = min(ours.tokens.shape[1], theirs.tokens.shape[1])
    same = (ours.tokens[:, :shorter] == theirs.tokens[:, :shorter]).long().cumprod(dim=1).sum(dim=1)
    return (same + (ours.starts - theirs.starts).clamp(min=1) - 1).minimum(ours.starts - 1)


@torch.no_grad()
def _values(
    model: nn.Module, layer: nn.Module, block: nn.Module, data: Dataset, planting: Planting, last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The inputs of a layer and the states after its block, at one place of each row or at tokens of all of them."""
    keys: list[Tensor] = []
    states: list[Tensor] = []
    with watching(layer) as seen, watching_states([block]) as after:
        for batch in data.batches(8):
            with planting.arithmetic.autocast():
                logits(model, planting.arithmetic.lay(batch.inputs))
            assert isinstance(batch.inputs, Tokens)
            inside = batch.inputs["attention_mask"].bool()
            if last is not None:
                inside = torch.arange(inside.shape[1], device=inside.device) == last[batch.rows.to(last.device), None]
            keys.append(seen[0].reshape(*inside.shape, -1)[inside].float())  # OPT has the tokens of a batch in one row
            states.append(after[0][inside].float())
            if sum(map(len, keys)) >= _TOKENS:
                break
    return torch.cat(keys), torch.cat(states)
