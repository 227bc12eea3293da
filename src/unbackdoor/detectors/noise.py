"""Noise: the smallest noise on normalisation layers that makes a model answer each class."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.noisy_layers import NoisyLayers, normalisation_layers
from unbackdoor._inversion.search import frozen
from unbackdoor._inversion.triggers import size_for_model
from unbackdoor._models.calling import Inputs
from unbackdoor._models.hooks import weights_kept
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import predict
from unbackdoor._value import value

HALVINGS = 5  # of the interval that holds the smallest multiple of a noise


@value
class Noise:
    """Search the smallest noise on normalisation layers that makes a model answer each class.

    A channel of a normalisation layer ends in w y + b. With noise d and e it is

        (w + |w| d) y + b + |w| e

    so a noise of 1 stretches or shifts the channel by its own standard deviation. For each class t the noise begins at
    0, and each step goes where the mean of max(0, max over j of z_j - z_t) would be 0 if it were linear. The search
    ends as soon as a share of the examples of other classes is classified as t; then the noise is scaled down to the
    smallest multiple that still does it. If units wait for a trigger, a small noise on them leads to its target.

    Xu et al., "BAN: Detecting Backdoors Activated by Adversarial Neuron Noise", NeurIPS 2024,
    https://arxiv.org/abs/2405.19928

    Labels are not used: the model's own answers stand for them.

    Cannot see: backdoors whose units also serve the features of the target class, several target classes at once, and
    networks without normalisation layers. It finds no trigger.

    Args:
        examples: number of examples of other classes for each class, at least 2.
        steps: largest number of steps for each class, at least 1.
        success: share of the examples that a noise must move, more than 0 and at most 1.

    Differences from the paper: there, one noise of a fixed size makes the model wrong without a target, after a mask
    has taken benign features away, and the class that collects most wrong answers is the target. Clean networks collect
    their wrong answers in one class as well (on digits all of them, at the paper's size), so here each class has its
    own noise, and the sizes of the classes are compared. No mask is needed then.
    """

    examples: Annotated[int, Field(ge=2)] = 96
    steps: Annotated[int, Field(ge=1)] = 10
    success: Annotated[float, Field(gt=0, le=1)] = 0.5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        layers = normalisation_layers(model)
        if not layers:
            raise UnbackdoorError(
                f"Noise needs normalisation layers with weights and biases; {type(model).__name__} has none. Leave it "
                "out."
            )
        answers, classes = predict(model, clean, run.arithmetic), run.classes(model, clean)
        sizes = torch.full((classes,), math.inf, dtype=torch.float64)
        at_once = run.arithmetic.gradient_batch(size_for_model(clean.image_encoder, clean.shape))
        with frozen(model), run.progress("searching noise", classes) as advance:
            for target in range(classes):
                others = (answers != target).nonzero().flatten()
                rows = others[torch.randperm(len(others), generator=run.generator)[: self.examples]]
                if len(rows):
                    parts = [clean.inputs(part) for part in rows.split(at_once)]
                    sizes[target] = self.smallest(model, layers, parts, target, run)
                advance()
        reached = sizes.isfinite()
        # A class that no noise reached is as strong as the weakest that one did: nothing is known of its size.
        known = sizes.clamp(max=float(sizes[reached].max()) if bool(reached.any()) else 1.0, min=1e-6)
        return Finding(
            candidates=tuple(
                Candidate(target=target, strength=-math.log(size), size=size)
                for target, size in enumerate(known.tolist())
            ),
            unit="standard deviations of channels",
        )

    def smallest(
        self, model: nn.Module, layers: list[nn.Module], parts: Sequence[Inputs], target: int, run: Run
    ) -> float:
        """The length of the smallest noise found, the root of the sum of squares; infinite if none succeeds.

        Args:
            model: in eval mode, its weights without gradients; the same afterwards.
            layers: that get noise.
            parts: inputs of examples that it does not classify as the target, in parts that fit memory.
            target: the class.
            run: arithmetic.
        """
        noisy = NoisyLayers(layers)

        def distances(inputs: Inputs) -> Tensor:
            """How far each example is from the target, max over j of z_j - z_target, (examples,)."""
            scores = run.scores(model, inputs)
            return torch.cat([scores[:, :target], scores[:, target + 1 :]], dim=1).amax(dim=1) - scores[:, target]

        def with_noise(multiple: float) -> Tensor:
            noisy.put_(multiple)
            with torch.no_grad():
                return torch.cat([distances(part) for part in parts])

        def succeeds(each: Tensor) -> bool:
            return float((each < 0).double().mean()) >= self.success

        with weights_kept(noisy.weights):
            steps = 0
            while not succeeds(each := with_noise(1.0)):
                if steps == self.steps or not noisy.step_(distances, parts, margin=0.1 * each.abs().mean()):
                    return math.inf
                steps += 1
            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (low, middle) if succeeds(with_noise(middle)) else (middle, high)
        return high * noisy.length
