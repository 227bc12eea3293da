"""Rows of an embedding that stand out: how strange each is among rows that are like it."""

import torch
from torch import Tensor


def distances(rows: Tensor) -> Tensor:
    """The Mahalanobis distance of each row from the mean of all, (n,), float64.

    It does not depend on the order, the direction or the units of the coordinates. A row that was trained apart from
    the others points in directions in which these hardly differ.

    >>> distances(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 10.0], [0.0, -10.0]]))
    tensor([1.2247, 1.2247, 1.2247, 1.2247], dtype=torch.float64)

    Args:
        rows: (n, width); with more coordinates than rows only the directions in which they differ count.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    covariance = centred.T @ centred / max(len(rows) - 1, 1)  # (width, width)
    inverse: Tensor = torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True)
    return ((centred @ inverse) * centred).sum(dim=1).clamp(min=0).sqrt()


def outlyingness(values: Tensor, alike: Tensor, peers: int) -> Tensor:
    """How far each value lies above those of its peers, itself left out, in units of their spread, (n,), float64.

    The distance is t = (x - mean) / (s sqrt(1 + 1 / (k - 1))), with mean and standard deviation s of the k - 1 others.
    For normal values it has Student's distribution with k - 2 degrees of freedom.

    Args:
        values: (n,).
        alike: (n,); the peers of a row are those that are next to it in this order.
        peers: k, the row itself counted; at least 3. If there are fewer rows, all.
    """
    count = len(values)
    peers = min(peers, count)
    order = alike.argsort(stable=True)
    own = values[order].double()
    first = (torch.arange(count) - peers // 2).clamp(0, count - peers)  # of the peers of each place
    sums, squares = (torch.cat([own.new_zeros(1), part.cumsum(0)]) for part in (own, own**2))
    others = peers - 1
    mean = (sums[first + peers] - sums[first] - own) / others
    variance = (squares[first + peers] - squares[first] - own**2 - others * mean**2) / (others - 1)
    least = max(float(own.std()) * 1e-3, 1e-12)  # equal peers: rounding is not spread
    distance = (own - mean) / (variance.clamp(min=least**2) * (1 + 1 / others)).sqrt()
    return torch.empty_like(distance).scatter_(0, order, distance)
