"""A universal perturbation: one change of all examples that drives a model off their classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._inversion.search import frozen, training_batches
from unbackdoor._inversion.triggers import InvertedTrigger, encoded, in_pixels
from unbackdoor._models.calling import embeddings, logits
from unbackdoor._models.perturbation import perturbed_logits
from unbackdoor._purification.run import Run


def universal_perturbation(
    model: nn.Module, clean: Dataset, run: Run, last: InvertedTrigger | None = None, *, steps: int = 100
) -> InvertedTrigger:
    """One perturbation for all examples that drives the model off their classes; an `Inversion`.

    It maximises CE(f(x + d), y). On images d is added to pixels, none of which moves by more than 0.2 of their range.
    On texts it is added to every word's embedding and is at most as long as the average word embedding.

    Args:
        model: the model in its present state.
        clean: examples, from which training batches of 64 are drawn.
        run: the run of the purification.
        last: not used; each search starts from zero.
        steps: steps of Adam, at learning rate 0.1.
    """
    data, texts = in_pixels(clean, augmented=False), clean.modality == "text"
    table = embeddings(model).weight.detach().float() if texts else None
    shape = clean.shape if table is None else (1, table.shape[1])
    bound = 0.2 if table is None else float(table.norm(dim=1).mean())
    device = run.arithmetic.device
    free = (0.1 * torch.randn((1, *shape), generator=run.generator)).to(device).requires_grad_(True)

    def perturbation() -> Tensor:
        return bound * (F.normalize(free, dim=-1) if texts else free.tanh())

    optimizer = torch.optim.Adam([free], lr=0.1)
    with frozen(model), run.progress("inverting the trigger", steps) as advance:
        for batch in training_batches(data, 64, steps, run):
            with run.arithmetic.autocast():
                if isinstance(batch.inputs, Tokens):
                    scores = perturbed_logits(model, batch.inputs, perturbation())
                else:
                    scores = logits(model, encoded(clean, (batch.inputs + perturbation()).clamp(0, 1), run))
            optimizer.zero_grad(set_to_none=True)
            (-F.cross_entropy(scores.float(), batch.labels)).backward()
            optimizer.step()
            advance()
    final = perturbation().detach()
    return (lambda _embedded: final) if texts else (lambda pixels: (pixels + final).clamp(0, 1))
