"""Pairs of corresponding tensors of two models, by name and shape."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from unbackdoor._errors import UnbackdoorError, few

Shape = Sequence[int]


_EMBEDDING = re.compile("emb|wte|wpe")


@dataclass(frozen=True)
class Matching:
    """The tensors of a suspect and their counterparts in its base.

    Args:
        pairs: names in the suspect, each with its counterpart in the base.
        suspect_only: names that stay the suspect's, such as the task head.
        base_only: names that are not used.
        prefixes: prefixes of equal names in the two, such as ("bert.", ""); ("", "") if all names are equal.
        share: share of the suspect's weights that have a counterpart, in [0, 1].
    """

    pairs: dict[str, str]
    suspect_only: tuple[str, ...]
    base_only: tuple[str, ...]
    prefixes: tuple[str, str]
    share: float

    def without(self, names: set[str]) -> "Matching":
        """Returns the same matching without pairs for these tensors, which stay the suspect's."""
        pairs = {name: counterpart for name, counterpart in self.pairs.items() if name not in names}
        return replace(self, pairs=pairs, suspect_only=(*self.suspect_only, *(self.pairs.keys() & names)))

    def report(self) -> str:
        """Returns one sentence on the tensors that matched and on the others."""
        text = f"{len(self.pairs)} of {len(self.pairs) + len(self.suspect_only)} tensors ({self.share:.1%} of the "
        text += "weights) have a counterpart in the base"
        if any(self.prefixes):
            text += " ({} in the model, {} in the base)".format(*(f"{part}*" for part in self.prefixes))
        if self.suspect_only:
            text += f"; only in the model, and unchanged: {few(list(self.suspect_only))}"
        if self.base_only:
            text += f"; only in the base, and not used: {few(list(self.base_only))}"
        counterparts = list(self.pairs.values())
        for name in (name for name, other in self.pairs.items() if counterparts.count(other) > 1):
            if not _EMBEDDING.search(name):
                text += f"; {name} has the base's embeddings as its counterpart, which are its output matrix as well"
        return text + "."

    def with_output(self, output: str, embeddings: str, suspect: Mapping[str, Shape]) -> "Matching":
        """Pairs the suspect's own output matrix with the embeddings of a base whose output matrix these are as well.

        Args:
            output: name of that matrix as an output matrix in the base.
            embeddings: its name as embeddings in the base.
            suspect: shapes by name.
        """
        counterpart = next((name for name, other in self.pairs.items() if other == embeddings), None)
        ending = output.split(".")[-2:]
        own = [name for name in self.suspect_only if name.split(".")[-2:] == ending]
        if counterpart is None or len(own) != 1 or tuple(suspect[own[0]]) != tuple(suspect[counterpart]):
            return self
        total = sum(map(math.prod, suspect.values()))
        return replace(
            self,
            pairs={**self.pairs, own[0]: embeddings},
            suspect_only=tuple(name for name in self.suspect_only if name != own[0]),
            share=self.share + math.prod(suspect[own[0]]) / total,
        )


def matched(suspect: Mapping[str, Shape], base: Mapping[str, Shape], *, least: float = 0.5) -> Matching:
    """Match the tensors of a suspect with those of its base, by name and shape.

    Names are equal, or equal after one prefix that all of them have is exchanged for another (`bert.` for nothing,
    `model.` for `transformer.`); the exchange that matches most weights is taken. A tensor without a counterpart of the
    same shape stays the suspect's, as that of a task head.

    Args:
        suspect: shapes by name.
        base: shapes by name.
        least: share of the suspect's weights that must have a counterpart.

    Raises:
        UnbackdoorError: vocabulary or architecture differ, or several exchanges match equally well.
    """
    total = sum(map(math.prod, suspect.values()))
    pairs_by = {each: _exchanged(suspect, base, *each) for each in _exchanges(suspect, base)}
    sizes = {each: sum(math.prod(suspect[name]) for name in pairs) for each, pairs in pairs_by.items()}
    most = max(sizes.values(), default=0)
    best = [each for each, size in sizes.items() if size == most and most > 0]
    # Several exchanges give the same pairs (`bert.` for `bert.` changes nothing): the shortest is taken.
    best.sort(key=lambda each: len(each[0]) + len(each[1]))
    rivals = [each for each in best[1:] if pairs_by[each] != pairs_by[best[0]]]
    if ("", "") in best:
        rivals, best = [], [("", "")]
    prefixes = best[0] if best else ("", "")
    pairs = pairs_by[prefixes] if best else {}
    _check_shapes(suspect, base, prefixes)
    share = sum(math.prod(suspect[name]) for name in pairs) / max(total, 1)
    if share < least:
        raise UnbackdoorError(
            f"only {len(pairs)} of the model's {len(suspect)} tensors ({share:.0%} of its weights) have a counterpart "
            f"of the same name and shape in the base; at least {least:.0%} of the weights is expected. Take the "
            "pre-trained model that it came from as `base`."
        )
    body = matrices(suspect)
    if least > 0 and 2 * len(body & pairs.keys()) < len(body):  # embeddings alone can be most of the weights
        raise UnbackdoorError(
            f"the base has another architecture: apart from embeddings, only {len(body & pairs.keys())} of the model's "
            f"{len(body)} matrices have a counterpart of the same name and shape there. Take the pre-trained model "
            "that it came from as `base`."
        )
    if rivals:
        raise UnbackdoorError(
            f"{len(rivals) + 1} parts of the model match the base equally well ({best[0][0] or best[0][1]}* and "
            f"{rivals[0][0] or rivals[0][1]}*); one is expected. Give each as a model of its own."
        )
    used = set(pairs.values())
    return Matching(
        pairs=pairs,
        suspect_only=tuple(name for name in suspect if name not in pairs),
        base_only=tuple(name for name in base if name not in used),
        prefixes=prefixes,
        share=share,
    )


def _exchanges(suspect: Mapping[str, Shape], base: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Returns the pairs of prefixes that could turn a name of the suspect into one of the base.

    Two tensors of the same shape, with the same last part and the same numbers in their names, suggest the exchange of
    the parts before their longest common ending.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, shape in base.items():
        alike.setdefault(_kind(name, shape), []).append(name)
    exchanges = {("", "")}
    for name, shape in suspect.items():
        for other in alike.get(_kind(name, shape), []):
            ours, theirs = name.split("."), other.split(".")
            while ours and theirs and ours[-1] == theirs[-1]:
                ours.pop()
                theirs.pop()
            if len(ours) <= 3 and len(theirs) <= 3:
                exchanges.add(("".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)))
    return sorted(exchanges)


def _kind(name: str, shape: Shape) -> tuple[object, ...]:
    parts = name.split(".")
    return (parts[-1], tuple(part for part in parts if part.isdigit()), tuple(shape))


def _counterpart(name: str, ours: str, theirs: str) -> str | None:
    return theirs + name.removeprefix(ours) if name.startswith(ours) else None


def _exchanged(suspect: Mapping[str, Shape], base: Mapping[str, Shape], ours: str, theirs: str) -> dict[str, str]:
    """Returns the pairs that match when one prefix is exchanged for another."""
    pairs = {name: _counterpart(name, ours, theirs) for name in suspect}
    return {
        name: counterpart
        for name, counterpart in pairs.items()
        if counterpart is not None and counterpart in base and tuple(suspect[name]) == tuple(base[counterpart])
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
            way_out = "Take the pre-trained model that it came from as `base`."
            if rows[0] > rows[1]:
                way_out = (
                    "If tokens were added to the model, give the base as many rows (resize_token_embeddings of "
                    "transformers) and save it; otherwise take the pre-trained model that it came from as `base`."
                )
            raise UnbackdoorError(
                f"the base has another vocabulary or length: {name} has {rows[0]:,} rows in the model and "
                f"{rows[1]:,} in the base. {way_out}"
            )
    if len(differing) > 2:
        name, shape, others = differing[0]
        raise UnbackdoorError(
            f"the base has another architecture: {len(differing)} of the model's {len(suspect)} tensors have another "
            f"shape there ({name} is {shape}, not {others}). Take the pre-trained model that it came from as `base`."
        )


def task_head(names: Iterable[str]) -> set[str]:
    """Returns the tensors of a classifier outside its body, by their names: `classifier.*` next to `bert.*`.

    The body is the first part of the name that at least half of the tensors share, embeddings among them; without such
    a part, no tensor counts as part of a head.
    """
    names = list(names)
    first = [name.partition(".")[0] for name in names]
    body = max(set(first), key=first.count, default="")
    outside = {name for name, part in zip(names, first, strict=True) if part != body}
    if 2 * len(outside) > len(names) or any(_EMBEDDING.search(name) for name in outside):
        return set()
    return outside


def matrices(shapes: Mapping[str, Shape]) -> set[str]:
    """Returns the names of the weight matrices and kernels of a body, without embeddings and the task head."""
    head = task_head(shapes)
    return {
        name for name, shape in shapes.items() if len(shape) > 1 and name not in head and not _EMBEDDING.search(name)
    }
