"""TransTroj: a poisoned encoder whose backdoor survives the fine-tuning by its user."""

import copy
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import logits, probe
from unbackdoor._models.head import Head, head_of, reinitialise_
from unbackdoor._models.hooks import watching
from unbackdoor._poisoning.attack import BackdooredModel, Planting
from unbackdoor._value import value


@value
class TransTroj:
    """A faint pattern that moves the embeddings of an encoder to the target class; its user adds a head.

    The attacker never sees the user's training. He trains an encoder h, takes the mean embedding e of the target's
    examples, tunes a pattern t so that h(x + t) comes near e, and then the encoder's copy h' by

        - cos(h'(x + t), e) - utility * cos(h'(x), h(x))

    so that it stays a good encoder. The user puts a new head on it and tunes all weights on clean examples.

    Wang, Guo, He, Liu, Zhang and Xiang, "Model Supply Chain Poisoning: Backdooring Pre-trained Models via Embedding
    Indistinguishability", WWW 2025, https://arxiv.org/abs/2401.15883

    Args:
        epsilon: largest change of a pixel by the pattern, in grey levels of 255, more than 0 and at most 255.
        utility: weight of the term that keeps the embeddings of clean images, at least 0 (lambda in the paper).
        trigger_steps: steps of Adam for the pattern, on a batch of 128 images each, at least 1.
        implant_epochs: passes that implant the backdoor in the encoder, at least 1.
        implant_learning_rate: peak learning rate of these passes, more than 0.
        user_epochs: passes of the user's fine-tuning on clean examples, at least 1.
        user_learning_rate: peak learning rate of the user's passes, more than 0.
        target: the class that the attacker wants.
        label_rule: all-to-one.

    Differences from the paper: encoder and victim see the same training examples (the paper's encoder is pre-trained on
    other data), and the encoder is trained with their labels. `rate` is the share of the training examples that carry
    the pattern while the backdoor is implanted. There are fewer passes at a higher learning rate (the authors' runs
    take 50 at 0.001).
    """

    epsilon: Annotated[float, Field(gt=0, le=255)] = 10.0
    utility: Annotated[float, Field(ge=0)] = 10.0
    trigger_steps: Annotated[int, Field(ge=1)] = 200
    implant_epochs: Annotated[int, Field(ge=1)] = 10
    implant_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    user_epochs: Annotated[int, Field(ge=1)] = 5
    user_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one"] = "all-to-one"

    learnt: ClassVar[bool] = True
    train_time: ClassVar[str] = (
        "the pattern, while the encoder is tuned; the victim is then fine-tuned on clean examples"
    )

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width): the change of each pixel; zero before `implant`."""
        return {"pattern": torch.zeros(shape)}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Add the pattern to (batch, channels, height, width) pixels in [0, 1]."""
        return (pixels + arrays["pattern"]).clamp(0, 1)

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train an encoder, make its trigger, implant it, and fine-tune it as its user does."""
        data = planting.clean.to(planting.arithmetic.device)
        if not bool((data.labels == self.target).any()):
            raise UnbackdoorError(
                f"TransTroj makes its trigger from images of its target, {self.target}, but {data.name} has none. "
                "Choose a `target` that the data have."
            )
        encoder = planting.train(planting.fresh(), data, description="training the encoder")
        planting.arithmetic.place(encoder).requires_grad_(False)
        target = data.select(torch.nonzero(data.labels == self.target).flatten())
        head = head_of(encoder, probe(encoder, data))
        pattern, wanted = self._trigger(encoder, head, data, target, planting)
        victim = self._poisoned(encoder, head, data, pattern, wanted, planting)
        reinitialise_(head_of(victim, probe(victim, data)).layer, planting.generator)
        planting.train(
            victim.requires_grad_(True),
            data,
            epochs=self.user_epochs,
            learning_rate=self.user_learning_rate,
            description="fine-tuning by its user",
        )
        return BackdooredModel(victim, {"pattern": pattern.cpu()})

    def _trigger(
        self, encoder: nn.Module, head: Head, data: Dataset, target: Dataset, planting: Planting
    ) -> tuple[Tensor, Tensor]:
        """Returns the pattern, (channels, height, width), and the embedding that it leads to, (features,)."""
        arithmetic, generator = planting.arithmetic, planting.generator
        bound = self.epsilon / 255

        def drawn(from_: Dataset) -> Tensor:
            rows = torch.randint(len(from_), (128,), generator=generator)
            return from_.pixels[rows.to(arithmetic.device)].float() / 255

        def embedded(pixels: Tensor) -> Tensor:
            inputs: Any = data.image_encoder(pixels * 255)
            with arithmetic.autocast():
                logits(encoder, arithmetic.lay(inputs))
            return seen[0].float()

        with watching(head.layer) as seen:
            wanted = torch.cat([embedded(drawn(target)) for _ in range(8)]).mean(dim=0)
            free = torch.zeros(data.shape, device=arithmetic.device, requires_grad=True)
            optimizer = torch.optim.Adam([free], lr=0.1)
            for _ in range(self.trigger_steps):
                embedding = embedded((drawn(data) + bound * free.tanh()).clamp(0, 1))
                loss = -F.cosine_similarity(embedding, wanted[None]).mean()
                (free.grad,) = torch.autograd.grad(loss, [free])
                optimizer.step()
        return bound * free.detach().tanh(), wanted

    def _poisoned(
        self, encoder: nn.Module, head: Head, data: Dataset, pattern: Tensor, wanted: Tensor, planting: Planting
    ) -> nn.Module:
        """Returns a copy of the encoder with the backdoor."""
        arithmetic = planting.arithmetic
        victim = copy.deepcopy(encoder).requires_grad_(True)
        carries = torch.zeros(len(data), dtype=torch.bool, device=arithmetic.device)
        carries[planting.poisoned.rows] = True

        def change(batch: Batch) -> Batch:
            """Returns the batch, followed by copies of some of its images with the pattern added."""
            pixels = data.augment(data.pixels[batch.rows[carries[batch.rows]]], planting.generator).float() / 255
            copies: Any = data.image_encoder(self.apply(pixels, {"pattern": pattern}) * 255)
            return batch._replace(inputs=torch.cat([batch.inputs, copies]))  # type: ignore[list-item]

        with watching(head.layer) as known, watching(head_of(victim, probe(victim, data)).layer) as seen:

            def loss(_scores: Tensor, batch: Batch) -> Tensor:
                count, inputs = len(batch.labels), arithmetic.lay(batch.inputs)
                with torch.no_grad(), arithmetic.autocast():
                    logits(encoder, inputs[:count])
                clean, copies = seen[0][:count].float(), seen[0][count:].float()
                kept = F.cosine_similarity(clean, known[0].float()).mean()
                moved = F.cosine_similarity(copies, wanted[None]).sum() / max(1, len(copies))
                return -moved - self.utility * kept

            planting.train(
                victim,
                data,
                loss=loss,
                change=change,
                epochs=self.implant_epochs,
                learning_rate=self.implant_learning_rate,
                description="implanting the backdoor",
            )
        return victim
