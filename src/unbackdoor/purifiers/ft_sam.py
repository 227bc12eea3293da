"""Fine-tuning by adaptive sharpness-aware minimisation."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.hooks import statistics_kept, weights_kept
from unbackdoor._purification.run import Run
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value


@value
class FTSAM:
    """Fine-tune with gradients taken at the nearby point where the loss is worst.

    The neurons that carry a backdoor have large weights, and plain fine-tuning does not change their norm. Here each
    step looks for the worst perturbation of the weights w, which may move large weights further than small ones, and
    descends by the gradient found there:

        e = rho * w^2 * g / | |w| * g |,   g = gradient of L at w,   w <- w - learning rate * gradient of L at w + e

    with products entry by entry and the norm over all parameters together; L is the cross-entropy with smoothed labels.

    Zhu, Wei, Shen, Fan and Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV
    2023, https://arxiv.org/abs/2304.11823; the perturbation is that of Kwon et al., "ASAM", ICML 2021,
    https://arxiv.org/abs/2102.11600, after Foret et al., "Sharpness-Aware Minimization", ICLR 2021,
    https://arxiv.org/abs/2010.01412

    Args:
        rho: how far the weights are perturbed, at least 0; 0 is plain fine-tuning.
        adaptive: perturb large weights further; otherwise e = rho * g / |g|, which needs a smaller rho (0.05, say).
        label_smoothing: share of the label that goes to all classes evenly, at least 0 and less than 1.
        epochs: passes over the clean examples, at least 1; each costs two forward and two backward passes.
        learning_rate: initial learning rate, more than 0; None is 0.05 (SGD) for images and 5e-5 (AdamW) for
            texts.
        batch_size: examples per step, at least 2; None is 64 for images and 16 for texts.

    Differences from the paper: ASAM's term that keeps the perturbation of weights near zero alive is left out, as in
    the authors' code. Their script makes 100 passes over 5 % of the training data in batches of 256 at 0.01, with
    weight decay; a fifth of the passes over fewer images needs smaller batches and larger steps. Its flag `--adaptive`
    switches the adaptive form off. A weight moves by up to rho times its square, so a suspect whose layers share the
    scale differently may need a smaller rho: docs/results/suspects.md. For larger tasks they use rho = 8 without label
    smoothing. On texts rho and AdamW are this project's choice.
    """

    rho: Annotated[float, Field(ge=0)] = 2.0
    adaptive: bool = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {
        "images": {"learning_rate": 0.05, "batch_size": 64},
        "text": {"learning_rate": 5e-5, "batch_size": 16},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""

        def backward(batch: Batch) -> None:
            scores = run.scores(model, batch.inputs)
            F.cross_entropy(scores, batch.labels, label_smoothing=self.label_smoothing).backward()

        def gradients(batch: Batch) -> None:
            backward(batch)
            moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
            with weights_kept(moved), statistics_kept(model):  # of BatchNorm: they belong to the unmoved weights
                self.perturb_(moved)
                backward(batch)

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=run.setting(self, "learning_rate"),
            batch_size=run.setting(self, "batch_size"),
            gradients=gradients,
        )
        return model

    @torch.no_grad()
    def perturb_(self, parameters: list[nn.Parameter]) -> None:
        """Add e to the parameters in place, and clear their gradients."""
        steps: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.adaptive:
            steps = [step * parameter.abs() for step, parameter in zip(steps, parameters, strict=True)]
        scale = self.rho / (torch.stack([step.norm() for step in steps]).norm() + 1e-12)
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.add_(scale * step * (parameter.abs() if self.adaptive else 1))
            parameter.grad = None
