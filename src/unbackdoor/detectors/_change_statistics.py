"""Numbers that describe the change which an adapter makes to a layer, from its factors alone."""

import re

import torch
from torch import Tensor

STATISTICS = ("largest singular value", "norm", "share of the first direction", "entropy", "kurtosis")
_ROWS = 512  # of the change that are in memory at a time


def kind_of(layer: str) -> str:
    """The name of a layer without the number of its block, which layers of one kind share.

    >>> kind_of("base_model.model.bert.encoder.layer.11.attention.self.query")
    'bert.encoder.layer.*.attention.self.query'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", layer.removeprefix("base_model.model."))


def statistics_of(columns: Tensor, rows: Tensor) -> dict[str, float]:
    """Returns the statistics of a change, columns @ rows, without a decomposition of the whole matrix.

    With the QR decompositions Q R of the columns and Q' R' of the transposed rows, the change is Q (R R'^T) Q'^T, so
    its singular values are those of the small matrix R R'^T. The norm is Frobenius'. The entropy is that of the shares
    of energy (squared singular values), in nats. The kurtosis is that of the entries, 3 for normal ones. All are 0 for
    a change of zeros.

    Args:
        columns: (outputs, rank), with the scale of the adapter.
        rows: (rank, inputs).
    """
    columns, rows = columns.detach().double().cpu(), rows.detach().double().cpu()
    small = torch.linalg.qr(columns, mode="r")[1] @ torch.linalg.qr(rows.T, mode="r")[1].T
    energies = torch.linalg.svdvals(small).square()
    energy = energies.sum()
    if energy == 0:
        return dict.fromkeys(STATISTICS, 0.0)
    shares = energies / energy
    numbers = (energies[0].sqrt(), energy.sqrt(), shares[0], torch.special.entr(shares).sum(), _kurtosis(columns, rows))
    return dict(zip(STATISTICS, map(float, numbers), strict=True))


def _kurtosis(columns: Tensor, rows: Tensor) -> float:
    """The fourth central moment of the entries over the square of the second; 0 if all entries are equal."""
    count = len(columns) * rows.shape[1]
    mean = columns.sum(dim=0) @ rows.sum(dim=1) / count
    second = fourth = 0.0
    for part in columns.split(_ROWS):
        squares = (part @ rows - mean).square()
        second += float(squares.sum())
        fourth += float(squares.square().sum())
    return count * fourth / second**2 if second > 0 else 0.0
