"""Mixing two models coordinate by coordinate: masks, their use, and which tensor of one belongs to which of the other.

Nothing here knows a model or a file: the in-memory method and the stream over checkpoints both call these functions,
and so give the same bits.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbackdoor._errors import UnbackdoorError, few

Mode = Literal["mask", "linear"]
Shape = Sequence[int]
Job = TypeVar("Job")

CHUNK = 2**20  # coordinates, in row-major order, that share one stream of random words
_BLOCK = 2**15  # a multiple of 4, so that blocks only divide the work
_WORDS = 2**16  # a coordinate is decided by one 16-bit word
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE = 2**16  # numbers of a matrix that a check of ancestry looks at
_EMBEDDING = re.compile("emb|wte|wpe")


def mask(name: str, shape: Shape, rho: float, seed: int) -> Tensor:
    """Which coordinates of a tensor keep the suspect's value.

    It depends on the seed, the tensor's name and the number of its coordinates alone: each chunk of 2^20 coordinates
    has a stream of its own, so neither threads nor shards matter. The streams are SFC64's raw words, which numpy keeps
    the same from version to version.

    Args:
        name: of the tensor in the suspect.
        shape: of the tensor.
        rho: probability of keeping a coordinate, in [0, 1]; applied as the nearest multiple of 2^-16, 0 and 1 exactly.
        seed: at least 0.

    Returns:
        True where the suspect's value stays, of that shape.
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
    float32 (float64 for a float64 suspect) and rounded once. Tensors that are not floating-point are the suspect's.

    Args:
        suspect: on the CPU.
        base: of the same shape, on the CPU.
        name: of the tensor in the suspect; see `mask`.
        rho: share of the suspect, in [0, 1].
        seed: see `mask`.
        mode: how.

    Returns:
        A new tensor of the suspect's shape and type.
    """
    if not suspect.is_floating_point():
        return suspect.clone()
    mixed = torch.empty(suspect.shape, dtype=suspect.dtype)
    target, ours, theirs = mixed.view(-1), suspect.detach().reshape(-1), base.detach().reshape(-1)

    def fill(index: int) -> None:
        part = slice(index * CHUNK, (index + 1) * CHUNK)
        mix_chunk_(target[part], ours[part], theirs[part], name, index, rho, seed, mode)

    each(fill, chunks(len(target)))
    return mixed


def mix_chunk_(
    out: Tensor, suspect: Tensor, base: Tensor, name: str, index: int, rho: float, seed: int, mode: Mode
) -> None:
    """Fill `out` with the mix of one chunk; all three are flat, and `out` has the suspect's floating-point type."""
    if mode == "linear":
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
    """The mask of one chunk, block by block: what a block needs stays in the processor's caches."""
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
    """Do all jobs, on all cores; numpy and torch let go of Python's lock while they compute.

    Torch computes each job on one thread meanwhile: its threads and these would be in each other's way.
    """
    if len(jobs) < 2:
        for job in jobs:
            work(job)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            for _ in pool.map(work, jobs):
                pass
    finally:
        torch.set_num_threads(threads)


def chunks(count: int) -> range:
    """The numbers of the chunks of so many coordinates."""
    return range(-(-count // CHUNK))


@dataclass(frozen=True)
class Matching:
    """Which tensor of the base belongs to which of the suspect.

    Args:
        pairs: names in the suspect, each with its counterpart in the base.
        suspect_only: names that stay the suspect's, such as the task head.
        base_only: names that nothing is taken from.
        prefixes: what the two put before the same names, such as ("bert.", ""); ("", "") where names are equal.
        share: of the suspect's weights that have a counterpart, in [0, 1].
    """

    pairs: dict[str, str]
    suspect_only: tuple[str, ...]
    base_only: tuple[str, ...]
    prefixes: tuple[str, str]
    share: float

    def without(self, names: set[str]) -> "Matching":
        """The same, but that these tensors stay the suspect's though the base has them, too."""
        pairs = {name: other for name, other in self.pairs.items() if name not in names}
        return replace(self, pairs=pairs, suspect_only=(*self.suspect_only, *(self.pairs.keys() & names)))

    def report(self) -> str:
        """What matched and what did not, in one sentence."""
        text = f"{len(self.pairs)} of {len(self.pairs) + len(self.suspect_only)} tensors ({self.share:.1%} of the "
        text += "weights) have a counterpart in the base"
        if any(self.prefixes):
            text += " ({} in the model, {} there)".format(*(f"{part}*" for part in self.prefixes))
        if self.suspect_only:
            text += f"; the model's own stay: {few(list(self.suspect_only))}"
        if self.base_only:
            text += f"; of the base are not used: {few(list(self.base_only))}"
        return text + "."


def matched(suspect: Mapping[str, Shape], base: Mapping[str, Shape], *, least: float = 0.5) -> Matching:
    """Match the tensors of a suspect with those of its base, by name and shape.

    Names are equal, or equal after one prefix that all of them have is exchanged for another (`bert.` for nothing,
    `model.` for `transformer.`); the exchange that matches most weights is taken. What has no counterpart of the same
    shape stays the suspect's, as a task head does.

    Args:
        suspect: shapes by name.
        base: shapes by name.
        least: share of the suspect's weights that must have a counterpart.

    Raises:
        UnbackdoorError: another vocabulary, another architecture, or several exchanges match equally well.
    """
    total = sum(map(math.prod, suspect.values()))
    found = {each: _exchanged(suspect, base, *each) for each in _exchanges(suspect, base)}
    sizes = {each: sum(math.prod(suspect[name]) for name in pairs) for each, pairs in found.items()}
    most = max(sizes.values(), default=0)
    best = [each for each, size in sizes.items() if size == most and most > 0]
    # The same pairs come about by several exchanges (`bert.` for `bert.` is none at all): the shortest stands for them.
    best.sort(key=lambda each: len(each[0]) + len(each[1]))
    rivals = [each for each in best[1:] if found[each] != found[best[0]]]
    if ("", "") in best:
        rivals, best = [], [("", "")]
    prefixes = best[0] if best else ("", "")
    pairs = found[prefixes] if best else {}
    _check_shapes(suspect, base, prefixes)
    share = sum(math.prod(suspect[name]) for name in pairs) / max(total, 1)
    if share < least:
        raise UnbackdoorError(
            f"only {len(pairs)} of the model's {len(suspect)} tensors ({share:.0%} of its weights) have a counterpart "
            f"of the same name and shape in the base; at least {least:.0%} of the weights is expected. Take the "
            "pre-trained model that it came from as --base."
        )
    body = matrices(suspect)
    if least > 0 and 2 * len(body & pairs.keys()) < len(body):  # embeddings alone can be most of the weights
        raise UnbackdoorError(
            f"the base has another architecture: beside embeddings only {len(body & pairs.keys())} of the model's "
            f"{len(body)} matrices have a counterpart of the same name and shape there. Take the pre-trained model "
            "that it came from as --base."
        )
    if rivals:
        raise UnbackdoorError(
            f"{len(rivals) + 1} parts of the model match the base equally well ({best[0][0] or best[0][1]}* and "
            f"{rivals[0][0] or rivals[0][1]}*); one is expected. Give them as models of their own."
        )
    taken = set(pairs.values())
    return Matching(
        pairs=pairs,
        suspect_only=tuple(name for name in suspect if name not in pairs),
        base_only=tuple(name for name in base if name not in taken),
        prefixes=prefixes,
        share=share,
    )


def _exchanges(suspect: Mapping[str, Shape], base: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """The pairs of prefixes that could turn a name of the suspect into one of the base.

    Two tensors of the same shape, with the same last part and the same numbers in their names, suggest the exchange of
    what stands before their longest common ending.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, shape in base.items():
        alike.setdefault(_kind(name, shape), []).append(name)
    found = {("", "")}
    for name, shape in suspect.items():
        for other in alike.get(_kind(name, shape), []):
            ours, theirs = name.split("."), other.split(".")
            while ours and theirs and ours[-1] == theirs[-1]:
                ours.pop()
                theirs.pop()
            if len(ours) <= 3 and len(theirs) <= 3:
                found.add(("".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)))
    return sorted(found)


def _kind(name: str, shape: Shape) -> tuple[object, ...]:
    parts = name.split(".")
    return (parts[-1], tuple(part for part in parts if part.isdigit()), tuple(shape))


def _counterpart(name: str, ours: str, theirs: str) -> str | None:
    return theirs + name.removeprefix(ours) if name.startswith(ours) else None


def _exchanged(suspect: Mapping[str, Shape], base: Mapping[str, Shape], ours: str, theirs: str) -> dict[str, str]:
    """What matches when one prefix is exchanged for another."""
    pairs = {name: _counterpart(name, ours, theirs) for name in suspect}
    return {
        name: other
        for name, other in pairs.items()
        if other is not None and other in base and tuple(suspect[name]) == tuple(base[other])
    }


def _check_shapes(suspect: Mapping[str, Shape], base: Mapping[str, Shape], prefixes: tuple[str, str]) -> None:
    """Refuse another vocabulary, and more tensors of another shape than weight and bias of one head."""
    differing = []
    for name, shape in suspect.items():
        other = _counterpart(name, *prefixes)
        if other is None or other not in base or tuple(shape) == tuple(base[other]):
            continue
        differing.append((name, tuple(shape), tuple(base[other])))
        rows = (shape[0], base[other][0]) if len(shape) == len(base[other]) == 2 else (0, 0)
        if rows[0] != rows[1] and shape[1] == base[other][1] and _EMBEDDING.search(name):
            way_out = "Take the pre-trained model that it came from as --base."
            if rows[0] > rows[1]:
                way_out = (
                    "If tokens were added to the model, give the base as many rows (resize_token_embeddings of "
                    "transformers) and save it; otherwise take the pre-trained model that it came from as --base."
                )
            raise UnbackdoorError(
                f"the base has another vocabulary or length: {name} has {rows[0]:,} rows in the model and "
                f"{rows[1]:,} in the base. {way_out}"
            )
    if len(differing) > 2:
        name, shape, others = differing[0]
        raise UnbackdoorError(
            f"the base has another architecture: {len(differing)} of the model's {len(suspect)} tensors have another "
            f"shape there ({name} is {shape}, not {others}). Take the pre-trained model that it came from as --base."
        )


def task_head(names: Iterable[str]) -> set[str]:
    """The tensors of a classifier that stand beside its body, where names tell: `classifier.*` beside `bert.*`.

    The body is the first part of the name that at least half of the tensors share, embeddings among them; without one,
    nothing is told.
    """
    names = list(names)
    first = [name.partition(".")[0] for name in names]
    body = max(set(first), key=first.count, default="")
    beside = {name for name, part in zip(names, first, strict=True) if part != body}
    if 2 * len(beside) > len(names) or any(_EMBEDDING.search(name) for name in beside):
        return set()
    return beside


def matrices(shapes: Mapping[str, Shape]) -> set[str]:
    """The names of the weight matrices and kernels of a body: embeddings and the task head are not among them."""
    head = task_head(shapes)
    return {
        name for name, shape in shapes.items() if len(shape) > 1 and name not in head and not _EMBEDDING.search(name)
    }


def doubts(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
    matching: Matching,
    suspect: Mapping[str, Shape],
    base: Mapping[str, Shape],
) -> list[str]:
    """What speaks against a base as the suspect's ancestor: the warnings of `ancestry` and `other_depth`."""
    found = (ancestry(pairs), other_depth(matching, suspect, base))
    return [doubt for doubt in found if doubt is not None]


def other_depth(matching: Matching, suspect: Mapping[str, Shape], base: Mapping[str, Shape]) -> str | None:
    """A warning with numbers where more matrices are without a counterpart than a pooler or a head would explain.

    Args:
        matching: of the two.
        suspect: shapes by name.
        base: shapes by name.
    """
    ours, theirs = matrices(suspect), matrices(base)
    left, unused = len(ours - matching.pairs.keys()), len(theirs - set(matching.pairs.values()))
    if max(left, unused) <= max(2, len(ours) // 10):
        return None
    return (
        f"model and base differ in architecture: beside embeddings {left} of the model's {len(ours)} matrices stay as "
        f"they are, since the base has none for them, and {unused} of the base's {len(theirs)} are not used. What "
        "stays keeps its part of a backdoor. Take the pre-trained model that it came from."
    )


def ancestry(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> str | None:
    """Check that a base is the suspect's ancestor: fine-tuned weights stay close to those they came from.

    Of each matrix, up to 2^16 coordinates from its middle are compared.

    Args:
        pairs: name, the suspect's tensor, the base's.

    Returns:
        A warning with numbers where the weights are no closer than those of unrelated models, or all the same.
    """
    correlations, distances, counts = [], [], []
    for _, suspect, base in pairs:
        if suspect.ndim < 2 or not suspect.is_floating_point():
            continue
        ours, theirs = _sample(suspect), _sample(base)
        length = ours.norm() * theirs.norm()
        if length == 0:
            continue
        distances.append(float((ours - theirs).norm() / ours.norm()))
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        length = ours.norm() * theirs.norm()
        correlations.append(float(ours @ theirs / length) if length > 0 else 1.0)
        counts.append(len(ours))
    if not correlations:
        return None
    correlation, distance = float(np.median(correlations)), float(np.median(distances))
    chance = 1 / math.sqrt(float(np.median(counts)))
    if max(distances) == 0:
        return (
            f"the {len(distances)} matrices that model and base have in common are equal: mixing changes next to "
            "nothing, and a backdoor can only be in the rest."
        )
    if correlation < max(0.1, 5 * chance):
        return (
            f"the base is probably not the model's ancestor: over {len(correlations)} matrices the weights correlate "
            f"by {correlation:.3f} (median; unrelated ones by 0 give or take {chance:.3f}), and lie {distance:.2f} "
            "times their length apart. Take the pre-trained model that it came from."
        )
    return None


def _sample(tensor: Tensor) -> Tensor:
    """Some coordinates from the middle, flat, in float64: a vocabulary begins with rows that nobody trains."""
    flat = tensor.detach().reshape(-1)
    start = max(len(flat) - SAMPLE, 0) // 2
    return flat[start : start + SAMPLE].double()
