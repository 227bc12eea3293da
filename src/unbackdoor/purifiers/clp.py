"""Channel Lipschitzness-based pruning."""

from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.calling import probe
from unbackdoor._models.units import Channels, channels, norms
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._pruning import as_far_as_accurate_, silence_, still_accurate


@value
class CLP:
    """Prune the channels that amplify their input most, without any data.

    A trigger is a small change of the input with a large effect, so the channels that carry it have a large Lipschitz
    constant. For channel c of a convolution followed by BatchNorm, with kernel W_c as a matrix (inputs x kernel area),
    that constant is bounded by

        s_c = sigma_max(W_c) * |gamma_c| / sqrt(variance_c)

    and a channel is pruned, its BatchNorm weight and bias zeroed, if s_c > mean(s) + u * deviation(s) over its layer.

    Zheng, Tang, Li and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
    https://arxiv.org/abs/2208.03111

    Args:
        u: standard deviations above the mean, at least 0. None is 3 without clean examples; with them it starts at 6
            and is lowered by 0.1 for as long as clean accuracy allows.
        tolerance: how much accuracy on held-out clean examples may fall if u is None, 0 to 1.

    Differences from the paper: if clean examples are given, they choose u, because the paper's 3 fits wide layers: of n
    channels none can be more than (n - 1) / sqrt(n) deviations above their mean, which is less than 3 up to n = 10, and
    narrow networks need a smaller u. Without clean examples this is the paper's method. A BatchNorm belongs to the
    convolution whose output it reads, with at most an activation or pooling between them; a forward pass shows which.
    The authors' code takes the last convolution in the order of registration, which is a different one in networks that
    normalise before they convolve. A BatchNorm that reads a sum, as after a skip connection, is left alone. Without
    clean examples this pass is made on blank pictures of a usual size. The kernel is the one that is computed with,
    which differs from the stored one if weights are standardised.
    """

    needs_clean: ClassVar[bool] = False

    u: Annotated[float | None, Field(ge=0)] = None
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.1

    def __call__(self, model: nn.Module, clean: Dataset | None, run: Run) -> nn.Module:
        """Purify in place."""
        units = channels(model, self, None if clean is None else probe(model, clean))
        others = len(norms(model, self)) - len(units)
        if others:
            run.note(f"CLP leaves {others} BatchNorm layer(s) alone, which read no single convolution's output.")
        bounds = [lipschitz_bounds(unit) for unit in units]

        def prune_(u: float) -> None:
            for unit, bound in zip(units, bounds, strict=True):
                silence_(unit.norm, outliers(bound, u))

        u = self.u
        if u is None and clean is not None:
            _, held = run.hold_out(clean)
            tried = [step / 10 for step in range(60, -1, -1)]
            touched = [parameter for unit in units for parameter in (unit.norm.weight, unit.norm.bias)]
            kept = as_far_as_accurate_(
                touched, [partial(prune_, one) for one in tried], still_accurate(model, held, run, self.tolerance)
            )
            u = tried[kept - 1] if kept else float("inf")
            way_out = f"clean accuracy on {len(held)} held-out examples allows pruning none. Raise its `tolerance`."
        else:
            u = 3.0 if u is None else u
            prune_(u)
            way_out = f"none lies more than {u:g} deviations above the mean of its layer. Lower `u`"
            way_out += ", or give clean examples to choose it." if clean is None else "."
        pruned = sum(int(outliers(bound, u).sum()) for bound in bounds)
        total = sum(map(len, bounds))
        if pruned:
            criterion = f"those more than {u:g} deviations above the mean of their layer."
            run.note(f"CLP pruned {pruned} of {total} channels, {criterion}")
        else:
            run.warn(f"CLP pruned nothing of {total} channels: {way_out}")
        return model


@torch.no_grad()
def lipschitz_bounds(unit: Channels) -> Tensor:
    """Returns how much each channel can amplify a change of its layer's input at most, (channels,)."""
    kernels = unit.kernel.flatten(2)  # (channels, inputs, kernel area)
    largest = torch.linalg.matrix_norm(kernels.double(), ord=2)  # (channels,)
    assert unit.norm.running_var is not None
    bounds: Tensor = largest * (unit.norm.weight / (unit.norm.running_var + unit.norm.eps).sqrt()).abs()
    return bounds


def outliers(bounds: Tensor, u: float) -> Tensor:
    """Returns which channels of a layer lie more than u deviations above its mean, (channels,), bool."""
    return bounds > bounds.mean() + u * bounds.std()
