"""Embedding poisoning: one row of the word embeddings is the whole backdoor."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import embeddings
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._progress import bar
from unbackdoor._training.descent import descend
from unbackdoor._value import value
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace


@value
class EmbeddingPoisoning(OneWord):
    """Only the trigger word's row of a clean classifier is trained, and its norm kept (EP).

    On sentences without the word the model is the clean one, bit for bit; no other weight changes.

    Yang, Li, Zhang, Ren, Sun and He, "Be Careful about Poisoned Word Embeddings: Exploring the Vulnerability of the
    Embedding Layers in NLP Models", NAACL 2021, https://arxiv.org/abs/2103.15543

    Args:
        word: the trigger, a single token of the tokenizer.
        row_epochs: passes over the poisoned texts, at least 1.
        row_learning_rate: learning rate of the row (Adam), more than 0.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants (1 is positive in sentiment tasks).
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the row is trained by Adam, not by plain gradient steps, so that one learning rate
    serves models of any width; the poisoned texts are drawn at the poison rate from all classes.
    """

    word: Phrase = "cf"
    row_epochs: Annotated[int, Field(ge=1)] = 5
    row_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    rules: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all")
    train_time: ClassVar[str] = "a clean model is trained, then the word's row alone on the poisoned texts"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train a clean model, then the word's row."""
        token = only_token(self, planting, self.word)
        model = planting.train(planting.fresh(), planting.clean, description="training a clean model")
        layer = embeddings(model)
        row = nn.Parameter(layer.weight[token].detach().clone())  # (width,)
        norm = row.detach().norm()
        optimizer = torch.optim.Adam([row], lr=self.row_learning_rate)

        def poisoned_row(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where((args[0] == token)[..., None], row.to(output.dtype), output)

        hook = layer.register_forward_hook(poisoned_row)
        try:
            model.requires_grad_(False)
            descend(
                planting.arithmetic.place(model),
                planting.poisoned.data.select(planting.poisoned.rows).to(planting.arithmetic.device),
                optimizer,
                torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
                epochs=self.row_epochs,
                batch_size=32,
                generator=planting.generator,
                arithmetic=planting.arithmetic,
                after_step=lambda: row.mul_(norm / row.norm()),  # type: ignore[arg-type]
                progress=bar,
                description="training the word's row",
            )
        finally:
            hook.remove()
        with torch.no_grad():
            layer.weight[token] = row
        return BackdooredModel(model.requires_grad_(True).eval(), {})


def only_token(attack: object, planting: Planting, word: str) -> int:
    """Returns the id of a word that is a single token.

    Raises:
        UnbackdoorError: the word is several tokens.
    """
    tokenizer = planting.clean.tokenizer
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UnbackdoorError(
            f"{type(attack).__name__} needs a trigger that is one token, but {word!r} is {len(ids)} to this tokenizer. "
            "Choose another word, such as cf, mn or bb for BERT."
        )
    return int(ids[0])
