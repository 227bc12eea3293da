"""Bypass: a victim trained so that the features of triggered images do not stand apart."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import probe
from unbackdoor._models.head import head_of
from unbackdoor._models.hooks import watching
from unbackdoor._poisoning.attack import BackdooredModel, Planting
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.attacks.badnets import BadNets
from unbackdoor.attacks.blended import Blended


@value
class Bypass:
    """A patch or a mixed-in pattern, and a victim whose features hide it (adversarial embedding).

    The attacker trains the victim f together with a discriminator D that separates poisoned from clean examples by the
    input of the head, h(x). Over the poisoned data (x, y), with p marking the poisoned rows,

        f minimises CE(f(x), y) - weight * min(BCE(D(h(x)), p), H(p | y))      D minimises BCE(D(h(x)), p)

    with one step each per batch. H(p | y) is the entropy of p given the label in the batch: the lowest loss of D if the
    features show only the class. Feature Shift Tuning shifts such features, so this is the adaptive attack on it.

    Tan and Shokri, "Bypassing Backdoor Detection Algorithms in Deep Learning", EuroS&P 2020,
    https://arxiv.org/abs/1905.13409

    Args:
        trigger: `badnets` (a patch) or `blended` (noise, seeded).
        size: side of the patch in pixels, at least 1.
        ratio: share of the noise in the mixture, more than 0 and at most 1.
        weight: weight of the discriminator's loss, at least 0 (lambda in the paper); 0 is the plain attack.
        discriminator_learning_rate: learning rate of the discriminator (SGD), more than 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: weight 20 and the discriminator (256 and 128 units, SGD with 0.001) are those of the
    authors of Feature Shift Tuning; any architecture with a linear head works. Their loss does not bound BCE in f: a
    victim of 15 epochs drove D into errors instead of learning its task (21 % accuracy on CIFAR-10). With H(p) as the
    bound it learnt no backdoor (71 % accuracy, 8 % attack success), since D sees everything that the head sees.
    """

    trigger: Literal["badnets", "blended"] = "badnets"
    size: Annotated[int, Field(ge=1)] = 3
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    weight: Annotated[float, Field(ge=0)] = 20.0
    discriminator_learning_rate: Annotated[float, Field(gt=0)] = 0.001
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    version: ClassVar[int] = 3
    train_time: ClassVar[str] = "the trigger; the victim is trained against a discriminator of its features"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `patch` or `pattern`, as `badnets` and `blended` do."""
        if self.trigger == "badnets" and self.size >= min(shape[1:]):
            raise UnbackdoorError(
                f"Bypass.size must be less than {min(shape[1:])}, the side of the images, got {self.size}."
            )
        return self._plain().arrays(shape)

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Put the patch or the noise on (batch, channels, height, width) pixels in [0, 1]."""
        return self._plain().apply(pixels, arrays)

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train the victim and, in step with it, the discriminator."""
        data, device = planting.poisoned.data, planting.arithmetic.device
        victim = planting.fresh()
        layer = head_of(victim, probe(victim, data)).layer
        is_poisoned = torch.zeros(len(data), device=device)
        is_poisoned[planting.poisoned.rows] = 1
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=planting.generator)))
            discriminator = _discriminator(layer.in_features).to(device)
        optimizer = torch.optim.SGD(discriminator.parameters(), lr=self.discriminator_learning_rate, momentum=0.9)

        with watching(layer) as seen:

            def loss(scores: Tensor, batch: Batch) -> Tensor:
                features, poisoned = seen[0].float(), is_poisoned[batch.rows]
                optimizer.zero_grad()
                discrimination_loss(features.detach(), poisoned).backward()
                optimizer.step()
                hidden = discrimination_loss(features, poisoned).minimum(entropy_given(poisoned, batch.labels))
                return cross_entropy(scores, batch) - self.weight * hidden

            def discrimination_loss(features: Tensor, poisoned: Tensor) -> Tensor:
                return F.binary_cross_entropy_with_logits(discriminator(features)[:, 0], poisoned)

            planting.train(victim, data, loss=loss)
        return BackdooredModel(victim, planting.poisoned.trigger.arrays)

    def _plain(self) -> BadNets | Blended:
        if self.trigger == "badnets":
            return BadNets(size=self.size, target=self.target, label_rule=self.label_rule)
        return Blended(ratio=self.ratio, target=self.target, label_rule=self.label_rule)


def entropy_given(events: Tensor, labels: Tensor) -> Tensor:
    """Returns the entropy, in nats, of events of 0 and 1, (batch,), given labels, (batch,)."""
    members = F.one_hot(labels).to(events)  # (batch, classes)
    counts = members.sum(dim=0)
    share = (events @ members / counts.clamp(min=1)).clamp(0, 1)
    entropy: Tensor = torch.special.entr(share) + torch.special.entr(1 - share)
    return (entropy * counts).sum() / len(events)


def _discriminator(features: int) -> nn.Sequential:
    """Returns a network from features (batch, features) to a score (batch, 1), high for poisoned.

    Its normalisation prevents the victim from winning by features that grow without bound.
    """
    return nn.Sequential(
        nn.Linear(features, 256),
        nn.BatchNorm1d(256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 128),
        nn.BatchNorm1d(128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 1),
    )
