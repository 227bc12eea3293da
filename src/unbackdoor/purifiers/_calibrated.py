"""The temperature at which a classifier is as sure as it is right, and a classifier whose answers are taken at it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.head import Head
from unbackdoor._models.hooks import removing
from unbackdoor._tasks.classification import answers

HOTTEST = 20.0
HALVINGS = 40  # of the interval of inverse temperatures


def calibrated_temperature(model: nn.Module, clean: Dataset, arithmetic: Arithmetic) -> float:
    """Returns the temperature, 1 to `HOTTEST`, at which the cross-entropy of a model's answers is the smallest.

    Temperature scaling: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    https://arxiv.org/abs/1706.04599. It is above 1 for a model that is surer than it is right. Answers are never
    sharpened: of a model that is right on all of a few examples no temperature would be low enough.

    Args:
        model: a classifier.
        clean: examples that it was not trained on; those with the label -1 do not count.
        arithmetic: device, precision, layout.
    """
    labelled = clean.select((clean.labels >= 0).nonzero()[:, 0].tolist())
    scores = answers(model, labelled, arithmetic).double()  # (n, classes)
    right = scores.gather(1, labelled.labels.cpu()[:, None])[:, 0]

    def slope(inverse: float) -> float:
        """Of the cross-entropy in the inverse temperature, in which it is convex."""
        return float(((scores * inverse).softmax(dim=1) * scores).sum(dim=1).sub(right).mean())

    low, high = 1 / HOTTEST, 1.0
    if not slope(high) > 0:
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / high


@contextmanager
def softened(model: nn.Module, head: Head, temperature: float) -> Iterator[None]:
    """While the block runs, a model's scores are divided by a temperature, and its head learns as if that were its own.

    A network whose head is T times as large answers the same classes. Divided by T its scores are equal as well, and
    the gradient of its body is. That of its head, at T times the length, is multiplied by T^2: then a step of SGD
    changes its scores, divided by T, as much as it would change those of the other network.

    Args:
        model: any classifier; its weights are not changed.
        head: its last linear layer.
        temperature: at least 1.
    """

    def divided(_module: nn.Module, _inputs: object, scores: Tensor) -> Tensor:
        return scores / temperature

    hooks = [head.layer.register_forward_hook(divided)]
    for parameter in head.layer.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(lambda gradient: gradient * temperature**2))
    with removing(hooks):
        yield
