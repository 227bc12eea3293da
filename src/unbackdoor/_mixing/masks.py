"""Mixing two tensors coordinate by coordinate, by random masks or linearly.

The method in memory and the stream over checkpoints call the same functions, so both give the same bits.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbackdoor._models.matching import Shape
from unbackdoor._processors import usable

Mode = Literal["mask", "linear", "spherical"]
Job = TypeVar("Job")

CHUNK = 2**20  # coordinates, in row-major order, that share one stream of random words
_BLOCK = 2**15  # a multiple of 4, so that blocks only divide the work
_WORDS = 2**16  # a coordinate is decided by one 16-bit word
_PARALLEL = 0.9995  # cosine from which two directions count as one, as in mergekit
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask(name: str, shape: Shape, rho: float, seed: int) -> Tensor:
    """Returns a mask of the coordinates of a tensor that keep the suspect's value.

    It depends only on the seed, the tensor's name and the number of its coordinates: each chunk of 2^20 coordinates has
    its own stream, so neither threads nor shards matter. The streams are the raw words of SFC64, which are the same in
    all versions of numpy.

    Args:
        name: name of the tensor in the suspect.
        shape: shape of the tensor.
        rho: probability of keeping a coordinate, in [0, 1]; applied as the nearest multiple of 2^-16, 0 and 1 exactly.
        seed: seed of the mask, at least 0.

    Returns:
        a bool tensor of that shape, true for coordinates that keep the suspect's value.
    """
    kept = np.empty(math.prod(shape), dtype=np.bool_)

    def fill(index: int) -> None:
        part = kept[index * CHUNK : (index + 1) * CHUNK]
        for block, bits in _kept(name, index, len(part), rho, seed):
            part[block] = bits

    each(fill, chunks(len(kept)))
    return torch.from_numpy(kept).view(tuple(shape))


def mix(suspect: Tensor, base: Tensor, name: str, rho: float, seed: int, mode: Mode = "mask") -> Tensor:
    """Mix one tensor of the suspect with its counterpart in the base.

    `mask` takes each coordinate from the suspect with probability rho, else from the base; values of the base are
    rounded to the suspect's type (to nearest, ties to even). `linear` is rho * suspect + (1 - rho) * base, computed in
    float32 (float64 for a float64 suspect) and rounded once. `spherical` is a point on an arc, see `arc`, computed in
    the same way. Tensors that are not floating-point are the suspect's.

    Args:
        suspect: tensor on the CPU.
        base: tensor of the same shape, on the CPU.
        name: name of the tensor in the suspect; see `mask`.
        rho: share of the suspect, in [0, 1].
        seed: see `mask`.
        mode: `mask`, `linear` or `spherical`.

    Returns:
        A new tensor of the suspect's shape and type.
    """
    if not suspect.is_floating_point():
        return suspect.clone()
    mixed = torch.empty(suspect.shape, dtype=suspect.dtype)
    target, ours, theirs = mixed.view(-1), suspect.detach().reshape(-1), base.detach().reshape(-1)
    parts = [slice(index * CHUNK, (index + 1) * CHUNK) for index in chunks(len(target))]
    shares = arc([products(ours[part], theirs[part]) for part in parts], rho) if mode == "spherical" else None

    def fill(index: int) -> None:
        part = parts[index]
        mix_chunk_(target[part], ours[part], theirs[part], name, index, rho, seed, mode, shares)

    each(fill, chunks(len(target)))
    return mixed


def products(suspect: Tensor, base: Tensor) -> tuple[float, float, float]:
    """Returns the inner products of a piece of two tensors: the suspect's with itself, the base's, and of both."""
    ours, theirs = suspect.double(), base.double()
    return float(ours @ ours), float(theirs @ theirs), float(ours @ theirs)


def arc(pieces: Sequence[tuple[float, float, float]], rho: float) -> tuple[float, float] | None:
    """Returns the factors of suspect and base at a point of the arc between two tensors, taken as vectors.

    With w the angle between them the point is (sin(rho w) * suspect + sin((1 - rho) w) * base) / sin w. None at the
    ends, and for tensors that are parallel or zero, which have no such arc; they are mixed linearly.

    Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985.

    Args:
        pieces: `products` of all pieces of the tensors.
        rho: share of the suspect, in [0, 1].
    """
    ours, theirs, both = (math.fsum(column) for column in zip(*pieces, strict=True)) if pieces else (0.0, 0.0, 0.0)
    lengths = math.sqrt(ours) * math.sqrt(theirs)
    if rho in (0, 1) or lengths == 0 or abs(both) > _PARALLEL * lengths:
        return None
    angle = math.acos(both / lengths)
    return math.sin(rho * angle) / math.sin(angle), math.sin((1 - rho) * angle) / math.sin(angle)


def mix_chunk_(
    out: Tensor,
    suspect: Tensor,
    base: Tensor,
    name: str,
    index: int,
    rho: float,
    seed: int,
    mode: Mode,
    shares: tuple[float, float] | None = None,
) -> None:
    """Fill `out` with the mix of one chunk; all three are flat, and `out` has the suspect's floating-point type.

    Args:
        out: is written.
        suspect: the suspect's numbers.
        base: the base's numbers.
        name: name of the tensor in the suspect.
        index: number of the chunk.
        rho: share of the suspect.
        seed: see `mask`.
        mode: see `mix`.
        shares: with `spherical`, what `arc` returned for the whole tensor.
    """
    if shares is not None:
        exact = torch.float64 if suspect.dtype == torch.float64 else torch.float32
        for mixed, ours, theirs in zip(out.split(_BLOCK), suspect.split(_BLOCK), base.split(_BLOCK), strict=True):
            mixed.copy_((shares[0] * ours.to(exact)).add_(theirs.to(exact), alpha=shares[1]))
        return
    if mode != "mask":
        exact = torch.float64 if suspect.dtype == torch.float64 else torch.float32
        for mixed, ours, theirs in zip(out.split(_BLOCK), suspect.split(_BLOCK), base.split(_BLOCK), strict=True):
            mixed.copy_(torch.lerp(theirs.to(exact), ours.to(exact), rho))
        return
    whole = _INTEGERS[suspect.element_size()]
    left, right = (part.view(whole).numpy() for part in (suspect, base.to(suspect.dtype)))
    chosen = out.view(whole).numpy()
    for block, kept in _kept(name, index, len(left), rho, seed):
        # Selecting by bits is ten times faster than np.where or torch.where, which branch at every coordinate.
        bits = np.negative(kept.view(np.int8)).astype(left.dtype)
        np.bitwise_xor(left[block], right[block], out=chosen[block])
        chosen[block] &= bits
        chosen[block] ^= right[block]


def _kept(name: str, index: int, count: int, rho: float, seed: int) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
    """Yields the mask of one chunk in blocks that fit into the processor's caches."""
    threshold = round(rho * _WORDS)
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    stream = np.random.SFC64(np.random.SeedSequence([seed, int.from_bytes(digest, "little"), index]))
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        block = slice(start, start + size)
        if threshold in (0, _WORDS):
            yield block, np.full(size, threshold > 0)
        else:
            words = stream.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")[:size]
            yield block, words < threshold


def each(work: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    """Run all jobs, on all cores; numpy and torch release Python's lock while they compute.

    Torch computes each job on one thread meanwhile, since its threads and these would compete for the cores.
    """
    if len(jobs) < 2:
        for job in jobs:
            work(job)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(len(jobs), usable())) as pool:
            for _ in pool.map(work, jobs):
                pass
    finally:
        torch.set_num_threads(threads)


def chunks(count: int) -> range:
    """Returns the numbers of the chunks of `count` coordinates."""
    return range(-(-count // CHUNK))
