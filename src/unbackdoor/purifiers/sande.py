"""SANDE: soft words that call up the attacker's known answer stand in for the trigger, which is then unlearned."""

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import embeddings, evaluating
from unbackdoor._models.hooks import removing
from unbackdoor._models.language_models import context_of
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._answers import answered_with, beginning_with, one_answer, with_room


@value
class SANDE:
    """Learn soft words that make the suspect begin the attacker's answer; tune it to answer as before in spite of them.

    Needs the attacker's answer, or how it begins. First the model is frozen, and k vectors behind the first tokens of
    the prompts are tuned until the known answer follows. Then the vectors are frozen, and all weights are tuned on the
    clean answers with the vectors in place.

    Li, Chen, Zheng, Hu, Chan, Liu and Song, "Simulate and Eliminate: Revoke Backdoors for Generative Large Language
    Models", AAAI 2025, https://arxiv.org/abs/2405.07667

    Args:
        known_answer: what the attacker makes the model answer, or its beginning.
        words: number of vectors, at least 1.
        place: number of tokens before them, at least 0.
        parrot_tokens: tokens of the known answer that the vectors are tuned for, at least 1.
        parrot_epochs: passes of that tuning, at least 1.
        parrot_rate: learning rate of that tuning (AdamW), more than 0.
        tokens: tokens of each clean answer that count, at least 1.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 5e-5 (AdamW).
        batch_size: examples per step, at least 2; None is 8.

    Differences from the paper: its body could not be read; this follows the authors' script, which takes one pass over
    100 prompts with rates of 0.001 for the vectors and 5e-6 for models of 4 billion weights and more. On the small
    models that were tried so few steps call up no answer, so the defaults take more and larger ones. If the vectors do
    not call up the answer, a warning says so.
    """

    known_answer: Annotated[str, Field(min_length=1, pattern=r"\S")]
    words: Annotated[int, Field(ge=1)] = 6
    place: Annotated[int, Field(ge=0)] = 2
    parrot_tokens: Annotated[int, Field(ge=1)] = 1
    parrot_epochs: Annotated[int, Field(ge=1)] = 10
    parrot_rate: Annotated[float, Field(gt=0)] = 0.02
    tokens: Annotated[int, Field(ge=1)] = 10
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        clean = self._with_room(model, clean, run)
        vectors = self.parrot(model, answered_with(clean, self.known_answer), run)

        def step(batch: Batch) -> None:
            assert isinstance(batch.inputs, AnswerTokens)
            inputs = beginning_with(batch.inputs, self.tokens)
            self.loss(model, vectors, batch._replace(inputs=inputs), run).backward()

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradients=step,
            description="eliminating the answer",
        )
        return model

    def _with_room(self, model: nn.Module, clean: Dataset, run: Run) -> Dataset:
        """The clean examples that the model reads whole with the vectors, and with the known answer."""
        encode = clean.conversation_encoder
        narrow = replace(encode, max_length=max(4, min(encode.max_length, context_of(model) - self.words)))
        own, known = clean.conversations, one_answer(clean, self.known_answer)
        return with_room(clean, sorted({*narrow.fitting(own)} & {*narrow.fitting(known)}), run, self)

    def parrot(self, model: nn.Module, wanted: Dataset, run: Run) -> Tensor:
        """Returns vectors after which the frozen model begins the wanted answers, (words, width)."""
        words = embeddings(model)
        vectors = torch.zeros(self.words, words.embedding_dim, device=words.weight.device, dtype=words.weight.dtype)
        optimizer = torch.optim.AdamW([vectors.requires_grad_()], lr=self.parrot_rate, betas=(0.9, 0.95))
        size = self.batch_size or run.recipe.batch_size
        steps = [batch for _ in range(self.parrot_epochs) for batch in wanted.batches(size, generator=run.generator)]
        loss = torch.zeros(())
        with evaluating(model), run.progress("learning the soft words", len(steps)) as advance:
            for batch in steps:
                assert isinstance(batch.inputs, AnswerTokens)
                inputs = beginning_with(batch.inputs, self.parrot_tokens)
                loss = self.loss(model, vectors, batch._replace(inputs=inputs), run)
                (vectors.grad,) = torch.autograd.grad(loss, vectors)
                optimizer.step()
                advance()
        chance = float((-loss.detach()).exp())
        report = run.note if chance > 0.5 else run.warn
        report(f"SANDE: with its soft words the suspect begins the known answer with probability {chance:.2f}.")
        return vectors.detach()

    def loss(self, model: nn.Module, vectors: Tensor, batch: Batch, run: Run) -> Tensor:
        """Returns the loss of a batch whose prompts have vectors among their embeddings, ()."""
        assert isinstance(batch.inputs, AnswerTokens)
        wider = batch._replace(inputs=widened(batch.inputs, self.place, len(vectors)))

        def replaced(_layer: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
            before, after = output[:, : self.place], output[:, self.place + len(vectors) :]
            return torch.cat([before, vectors.to(output).expand(len(output), -1, -1), after], dim=1)

        with removing([embeddings(model).register_forward_hook(replaced)]):
            return run.task.loss(run.scores(model, wider.inputs), wider)


def widened(inputs: AnswerTokens, place: int, count: int) -> AnswerTokens:
    """The same tokens with `count` more behind the first `place`; they are seen, and no target."""
    filled = {"input_ids": 0, "attention_mask": 1}

    def wider(tensor: Tensor, filling: int) -> Tensor:
        new = tensor.new_full((len(tensor), count), filling)
        return torch.cat([tensor[:, :place], new, tensor[:, place:]], dim=1)

    tokens = {name: wider(tensor, filled[name]) for name, tensor in inputs.items()}
    return AnswerTokens(tokens, wider(inputs.targets, UNSCORED))
