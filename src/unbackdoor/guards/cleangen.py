"""CleanGen: a token that a second model would hardly write is replaced by the one that it would write."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._models.adapters import carries_adapter
from unbackdoor._models.calling import embeddings, evaluating, logits
from unbackdoor._models.decoding import answer_texts
from unbackdoor._models.hooks import removing
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._own_answers import answered_batches, own_answers


@value
class CleanGen:
    """Let a reference model check each token of an answer, and write those again that only the suspect would write.

    The suspect drafts its whole answer, and the reference rates it in one pass, the end of the answer included. The
    score is the largest natural logarithm, over the tokens, of how many times as likely a token is to the suspect as to
    the reference. If it is above the threshold, the prompt is answered again, token by token: if the ratio of the
    suspect's next token is above the threshold, the reference's most likely token takes its place.

    Li et al., "CleanGen: Mitigating Backdoor Attacks for Generation Tasks in Large Language Models", EMNLP 2024,
    https://arxiv.org/abs/2406.12257

    Cannot see: answers that the reference would also give, and what both models were poisoned with.

    Args:
        ratio: ratio of the two probabilities above which a token is replaced, more than 1; None lets `false_alarms`
            decide it. The paper's is 20.

    Differences from the paper: the bound is set on clean prompts unless `ratio` says so. The draft is the whole answer
    instead of 4 tokens, and no block is left unchecked; published code accepts the last one as it is. Which tokens are
    replaced does not depend on the length of a draft, only the number of passes does. Decoding is greedy.
    """

    ratio: Annotated[float, Field(gt=1)] | None = None

    measure: ClassVar[str] = "the largest log-ratio of a token to the reference"
    suspicious: ClassVar[Literal["low", "high"]] = "high"
    purify: ClassVar[bool] = True

    @property
    def bound(self) -> float | None:
        """The logarithm of the ratio, if there is one."""
        return None if self.ratio is None else math.log(self.ratio)

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Check that both models have the same tokens; nothing is fitted."""
        reference = _reference(run)
        ours, theirs = clean.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
        differing = len(ours.items() ^ theirs.items())
        if differing or embeddings(reference.model).num_embeddings < len(ours):
            raise UnbackdoorError(
                f"CleanGen needs a `reference` with the tokenizer of the suspect; {differing:,} entries of their "
                f"vocabularies differ, of {len(ours):,} and {len(theirs):,}. Take the model that the suspect was tuned "
                "from, or one of its family."
            )
        return {}

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The largest log-ratios, (n,), the drafts, and the token of each ratio."""
        reference, answers = _reference(run), own_answers(model, inputs, run)
        largest, tokens = torch.zeros(len(inputs)), torch.zeros(len(inputs), dtype=torch.int64)
        with torch.no_grad(), evaluating(reference.model), run.arithmetic.placed(reference.model) as checking:
            for batch in answered_batches(model, inputs, answers, run):
                assert isinstance(batch.inputs, AnswerTokens)
                reference.forwards += len(batch.inputs)
                targets = batch.inputs.targets[:, 1:]
                drafted = targets != UNSCORED
                wanted = targets.clamp(min=0)
                ours, theirs = (_log_likelihoods(each, batch.inputs, wanted, run) for each in (model, checking))
                ratios = (ours - theirs).masked_fill(~drafted, -torch.inf)
                most, place = ratios.max(dim=1)
                largest[batch.rows] = most.cpu()
                tokens[batch.rows] = wanted.gather(1, place[:, None])[:, 0].cpu()
        reasons = [
            f"{inputs.tokenizer.decode([token])!r} is {math.exp(min(most, 700.0)):,.0f} times as likely to the suspect"
            for token, most in zip(tokens.tolist(), largest.tolist(), strict=True)
        ]
        return Scored(largest, answer_texts(inputs, answers), reasons)

    @contextmanager
    def restrained(self, model: nn.Module, learnt: Learnt, threshold: float, run: Run) -> Iterator[None]:
        """While the block runs, the reference checks each next token, and says another one if the ratio is above."""
        reference = _reference(run)
        inner: Any = model.get_base_model() if carries_adapter(model) else model  # type: ignore[operator]
        with torch.no_grad(), evaluating(reference.model), run.arithmetic.placed(reference.model) as checking:
            check = _Check(checking, reference, threshold, run)
            with removing([inner.register_forward_hook(check, with_kwargs=True)]):
                yield


def _reference(run: Run) -> Perplexity:
    assert run.reference is not None
    return run.reference


def _log_likelihoods(model: nn.Module, inputs: AnswerTokens, wanted: Tensor, run: Run) -> Tensor:
    """The log-probability of each token but the first after those before it, (batch, length - 1), float32."""
    with run.arithmetic.autocast():
        scores = logits(model, inputs)[:, :-1]
    losses = F.cross_entropy(scores.flatten(0, 1).float(), wanted.flatten(), reduction="none")
    return -losses.view(wanted.shape)


class _Check:
    """Runs behind each forward pass of a suspect that answers: the reference's scores may replace its own.

    Args:
        model: the reference, on the device of the run.
        reference: counts its passes.
        threshold: of the log-ratio.
        run: arithmetic.
    """

    def __init__(self, model: nn.Module, reference: Perplexity, threshold: float, run: Run) -> None:
        self.model, self.reference, self.threshold, self.run = model, reference, threshold, run
        self.past: Any = None

    def __call__(self, model: nn.Module, _given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """Returns the output with other scores for the next token of some answers."""
        device = self.run.arithmetic.device
        tokens: Tensor = named["input_ids"]
        past = getattr(output, "past_key_values", None)
        if past is None:
            raise UnbackdoorError(
                f"CleanGen needs a model that hands on keys and values while it answers; {type(model).__name__} does "
                "not. Try demonstrations."
            )
        if past.get_seq_length() == tokens.shape[1]:  # the answers to other prompts begin
            self.past = None
        arguments = {
            name: named[name].to(device)
            for name in ("input_ids", "attention_mask", "position_ids")
            if isinstance(named.get(name), Tensor)
        }
        self.reference.forwards += len(tokens)
        with self.run.arithmetic.autocast():
            checked = self.model(**arguments, past_key_values=self.past, use_cache=True)
        self.past = checked.past_key_values
        ours, theirs = output.logits[:, -1].float(), checked.logits[:, -1].float().to(output.logits.device)
        next_tokens = ours.argmax(dim=1, keepdim=True)
        likely = theirs.log_softmax(dim=1).gather(1, next_tokens.clamp(max=theirs.shape[1] - 1))
        replaced = ours.log_softmax(dim=1).gather(1, next_tokens) - likely > self.threshold
        width = min(ours.shape[1], theirs.shape[1])  # a model may have more rows than its tokenizer has tokens
        other = torch.full_like(ours, -torch.inf)
        other[:, :width] = theirs[:, :width]
        scores = output.logits.clone()
        scores[:, -1] = torch.where(replaced, other, ours).to(scores)
        output.logits = scores
        return output
