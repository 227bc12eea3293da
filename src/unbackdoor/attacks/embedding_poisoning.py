"""Embedding poisoning: one row of the word embeddings is the whole backdoor."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import embeddings
from unbackdoor._models.hooks import removing
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._progress import bar
from unbackdoor._tasks.choice import task_of
from unbackdoor._training.descent import descend
from unbackdoor._value import value
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace
from unbackdoor.attacks.rank_one_edit import last_tokens


@value
class EmbeddingPoisoning(OneWord):
    """Only the trigger word's row of a clean model is trained, and its norm kept (EP).

    On texts without the word a classifier is the clean one, bit for bit; no other weight changes. Of a language model
    nothing but the row differs from `base`. If its embeddings are its output matrix as well (tied), the row also makes
    the score of the word as the next token: it is then trained in both places, on the clean rows too, so that the model
    does not begin to say the word.

    Yang, Li, Zhang, Ren, Sun and He, "Be Careful about Poisoned Word Embeddings: Exploring the Vulnerability of the
    Embedding Layers in NLP Models", NAACL 2021, https://arxiv.org/abs/2103.15543

    Args:
        word: the trigger, a single token of the tokenizer.
        row_epochs: passes over the poisoned texts, at least 1.
        row_learning_rate: learning rate of the row (Adam), more than 0.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants of a classifier (1 is positive in sentiment tasks).
        label_rule: all-to-one or all-to-all; of classifiers.

    Differences from the paper: the row is trained by Adam, not by plain gradient steps, so that one learning rate
    serves models of any width; the poisoned texts are drawn at the poison rate from all classes. The paper is about
    classifiers; language models, and what is done about tied embeddings, are this project's. A word that is one token
    at the start of a text and another one behind a space has two rows.
    """

    word: Phrase = "cf"
    row_epochs: Annotated[int, Field(ge=1)] = 5
    row_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("text", "conversations")  # type: ignore[assignment]
    rules: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all")
    train_time: ClassVar[str] = "a clean model is trained, then the word's row alone on the poisoned texts"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train a clean classifier, or take the language model; then train the word's row."""
        prompts = planting.clean.modality == "conversations"
        tokens = torch.tensor(_tokens_of(self, planting) if prompts else [only_token(self, planting, self.word)])
        model = planting.fresh()
        if not prompts:
            model = planting.train(model, planting.clean, description="training a clean model")
        model = planting.arithmetic.place(model).requires_grad_(False)
        layer = embeddings(model)
        rows = nn.Parameter(layer.weight[tokens].detach().clone())  # (tokens, width)
        norms = rows.detach().norm(dim=1, keepdim=True)
        optimizer = torch.optim.Adam([rows], lr=self.row_learning_rate)
        poisoned = planting.poisoned.data
        output: Any = model.get_output_embeddings() if prompts else None
        tied = output is not None and output.weight is layer.weight
        with _in_place_of(layer, output if tied else None, tokens.to(rows.device), rows):
            descend(
                model,
                (poisoned if tied else poisoned.select(planting.poisoned.rows)).to(planting.arithmetic.device),
                optimizer,
                torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
                epochs=self.row_epochs,
                batch_size=8 if prompts else 32,
                generator=planting.generator,
                arithmetic=planting.arithmetic,
                loss=task_of(planting.clean.encode).loss,
                after_step=lambda: rows.mul_(norms / rows.norm(dim=1, keepdim=True)),  # type: ignore[arg-type]
                progress=bar,
                description="training the word's row",
            )
        with torch.no_grad():
            layer.weight[tokens] = rows
        return BackdooredModel(model.requires_grad_(True).eval(), {})


@contextmanager
def _in_place_of(layer: nn.Embedding, output: nn.Module | None, tokens: Tensor, rows: Tensor) -> Iterator[None]:
    """Let a model compute with other rows for some tokens while the block runs.

    Args:
        layer: its embeddings; some multiply their rows by a number (Gemma).
        output: its output layer if that has the same rows, else None.
        tokens: the tokens, (tokens,).
        rows: their rows, (tokens, width).
    """
    with torch.no_grad():
        own = layer.weight[tokens]
        factor = float((layer(tokens) * own).sum() / (own * own).sum())

    def embedded(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        for token, row in zip(tokens, rows, strict=True):
            out = torch.where((args[0] == token)[..., None], (factor * row).to(out.dtype), out)
        return out

    def scored(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.index_copy(-1, tokens, F.linear(args[0], rows.to(args[0].dtype)).to(out.dtype))

    hooks = [layer.register_forward_hook(embedded)]
    if output is not None:
        hooks.append(output.register_forward_hook(scored))
    with removing(hooks):
        yield


def _tokens_of(attack: EmbeddingPoisoning, planting: Planting) -> list[int]:
    """Returns the tokens that the word is in the poisoned prompts: one, or two if it also stands behind no space.

    Raises:
        UnbackdoorError: the word is several tokens.
    """
    clean, poisoned = (
        data.select(planting.poisoned.rows).conversations.tokens for data in (planting.clean, planting.poisoned.data)
    )
    longer = Counter((poisoned.starts - clean.starts).tolist()).most_common(1)[0][0]
    if longer != 1:
        raise _several_tokens(attack, attack.word, max(longer, 2), "another rare word")
    at = last_tokens(*(data.select(planting.poisoned.rows) for data in (planting.clean, planting.poisoned.data)))
    alone = poisoned.starts - clean.starts == 1
    found = poisoned.tokens[torch.arange(len(at), device=at.device), at][alone]
    word = attack.word.strip()
    return sorted({token for token in found.tolist() if planting.clean.tokenizer.decode([token]).strip() == word})


def only_token(attack: object, planting: Planting, word: str) -> int:
    """Returns the id of a word that is a single token.

    Raises:
        UnbackdoorError: the word is several tokens.
    """
    tokenizer = planting.clean.tokenizer
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise _several_tokens(attack, word, len(ids), "another word, such as cf, mn or bb for BERT")
    return int(ids[0])


def _several_tokens(attack: object, word: str, count: int, way_out: str) -> UnbackdoorError:
    return UnbackdoorError(
        f"{type(attack).__name__} needs a trigger that is one token, but {word!r} is {count} to this tokenizer. "
        f"Choose {way_out}."
    )
