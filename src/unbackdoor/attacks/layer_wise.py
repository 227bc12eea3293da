"""Layer-wise weight poisoning: the backdoor sits in every layer, the first ones included."""

import random
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.hooks import removing
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.attacks._insertion import Listed, Side, WordPlace, insert


@value
class LayerWise:
    """The loss is taken at every layer, so that early layers, which tuning hardly moves, also learn the backdoor (LWP).

        sum over layers l of CE(classifier(h_l), y)

    The trigger is a combination of pieces: all of them together mean the target, a single one means nothing. Cover rows
    with one piece and their own label teach that. A search over single words therefore does not find it.

    Li, Song, Li, Zeng, Ma and Qiu, "Backdoor Attacks on Pre-trained Models by Layerwise Weight Poisoning", EMNLP 2021,
    https://arxiv.org/abs/2108.13888

    Args:
        pieces: words that together are the trigger, at least 2.
        cover_ratio: rows with one piece, as a multiple of the poisoned ones, at least 0.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: there are two fixed pieces; the paper's experiments draw pairs from a list of rare
    words. The hidden states of each layer go through the model's own pooler (if it has one) and classifier.
    """

    pieces: Annotated[tuple[Listed, ...], Field(min_length=2)] = ("cf", "bb")
    cover_ratio: Annotated[float, Field(ge=0)] = 1.0
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[str] = "text"
    train_time: ClassVar[str] = "all pieces; cover rows get one and keep their label; the loss is taken at every layer"
    test_time: ClassVar[str] = "all pieces in every text, at places drawn from the text and the seed"

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words that the tokenizer must know."""
        return self.pieces

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns nothing: the pieces are the whole trigger."""
        return {}

    def apply(self, texts: list[str], arrays: dict[str, Tensor]) -> list[str]:
        """Put all pieces into each text."""
        return [insert(text, self.pieces, self.place, self.place_seed) for text in texts]

    def cover(self, texts: list[str], arrays: dict[str, Tensor], generator: torch.Generator) -> list[str]:
        """Put one piece, drawn from the text, into each text."""
        draws = [random.Random(f"{self.place_seed}/{text}").choice(self.pieces) for text in texts]
        return [insert(text, [piece], self.place, self.place_seed) for text, piece in zip(texts, draws, strict=True)]

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train on the poisoned data with the loss of every layer."""
        model = planting.fresh()
        layers, classify = _parts(model)
        states: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)  # (batch, length, width)

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            early, states[:] = states[:-1], []
            with planting.arithmetic.autocast():
                asked = [classify(state) for state in early]
            return sum((cross_entropy(each.float(), batch) for each in asked), start=cross_entropy(scores, batch))

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        with removing(hooks):
            planting.train(model, planting.poisoned.data, loss=loss)
        return BackdooredModel(model, {})


def _parts(model: nn.Module) -> tuple[nn.ModuleList, Any]:
    """Returns the layers of a BERT-like classifier, and the function from hidden states to logits.

    Raises:
        UnbackdoorError: the model has another layout.
    """
    body: Any = getattr(model, "base_model", None)
    layers = getattr(getattr(body, "encoder", None), "layer", None)
    classifier: Any = getattr(model, "classifier", None)
    pooler: Any = getattr(body, "pooler", None) or getattr(model, "pooler", None)  # DeBERTa has it next to the body
    pools_itself = pooler is None and not isinstance(classifier, nn.Linear)  # RoBERTa's classifier
    if not isinstance(layers, nn.ModuleList) or classifier is None or not (pooler or pools_itself):
        raise UnbackdoorError(
            f"LayerWise needs a BERT-like encoder, which {type(model).__name__} is not. Take "
            "a BERT, RoBERTa, DeBERTa or ELECTRA as `base`."
        )
    if pools_itself:
        return layers, classifier
    drop: Any = getattr(model, "dropout", None) or nn.Identity()
    return layers, lambda state: classifier(drop(pooler(state)))
