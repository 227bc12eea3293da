"""`purify_stream`: mix two checkpoints on disk, with a few pieces of tensors in memory, whatever their size."""

import logging
import platform
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor

from unbackdoor._artifacts import card, directories
from unbackdoor._artifacts.machine import peak_memory
from unbackdoor._artifacts.record import last_name, write_record
from unbackdoor._errors import UnbackdoorError, few
from unbackdoor._inputs import read_json
from unbackdoor._mixing import masks
from unbackdoor._mixing.adapter_stream import mix_adapter
from unbackdoor._mixing.ancestry import SAMPLE, doubts, split_output
from unbackdoor._mixing.checkpoint import Checkpoint, finite, header_bytes, write
from unbackdoor._mixing.election import Cut, cut, mix_
from unbackdoor._mixing.masks import CHUNK, Mode
from unbackdoor._mixing.output_layer import WORDS, split, stored_copy, with_output
from unbackdoor._models.adapters import is_adapter
from unbackdoor._models.companions import copy_companions
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.matching import Matching, matched, task_head
from unbackdoor._models.recorded import recorded_encode
from unbackdoor._models.tokenizer import check_rows
from unbackdoor._processors import usable
from unbackdoor._progress import bar, silent
from unbackdoor._value import check_seed

logger = logging.getLogger("unbackdoor")


def purify_stream(
    model: str | Path | ModelDirectory,
    base: str | Path | ModelDirectory,
    out: str | Path,
    *,
    rho: float,
    seed: int = 0,
    mode: Mode | Literal["sign-elected"] = "mask",
    proxy: str | Path | ModelDirectory | None = None,
    reset_rows: Mapping[str, Sequence[int]] | None = None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    method: Mapping[str, Any] | None = None,
    command: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Mix a suspect with its base on disk: each coordinate keeps the suspect's value with probability rho.

    The result has the suspect's files, shards and tensor types, and is bit for bit the result of `masks.mix` for each
    tensor. No model is built, so none has to fit into memory. Tensors without a counterpart stay the suspect's, and so
    does the head of a classifier, even if the base is a classifier.

    An adapter of a language model gives an adapter: with its base, by `linear`, it gets a smaller alpha; with another
    adapter of the same base, ranks that are the sums of theirs.

    Args:
        model: the suspect, a Hugging Face directory with safetensors files, or a Hub name; or an adapter's directory.
        base: the pre-trained model that it came from, a directory or Hub name; or another adapter of that.
        out: directory to write; it is complete or absent.
        rho: share of the suspect, in [0, 1].
        seed: seed of the masks; see `masks.mask`.
        mode: see `masks.mix`; `sign-elected` merges the changes of suspect and `proxy` from the base by their signs,
            rho being the share of each that stays; see `merging.sign_elected`.
        proxy: with `sign-elected`: another model that came from the base, a directory or Hub name.
        reset_rows: rows of matrices that are taken from the base before mixing, by the tensor's name in the suspect, as
            Embedding Purification does.
        notes: sentences for `record.json`, before its own notes.
        warnings: sentences for `record.json` and the card, before its own warnings.
        method: entry `method` of `record.json`; by default rho and mode.
        command: entry `command` of `record.json`; by default there is none.
        overwrite: replace a directory that unbackdoor wrote.
        progress: show a progress bar on stderr.

    Returns:
        The content of `record.json`.

    Raises:
        UnbackdoorError: the files are damaged or do not belong together, or a weight is not finite.
        IncompleteError: the disk is full.
    """
    _check_setting(rho, mode, seed, proxy)
    start = time.perf_counter()
    chosen = dict(method or _default_method(rho, mode))
    if isinstance(model, str | Path) and is_adapter(Path(model)):
        kind = _adapter_mode(mode, reset_rows)
        before = directories.check_free(Path(out), overwrite=overwrite, inputs=(Path(model), Path(base)))
        with directories.directory(Path(out), before) as folder:
            return _written_adapter(folder, Path(model), Path(base), rho, kind, chosen, command, seed, notes, warnings)
    source, origin = ModelDirectory.of(model, "`model`"), ModelDirectory.of(base, "`base`")
    other = None if proxy is None else ModelDirectory.of(proxy, "`proxy`")
    inputs = tuple(each.path for each in (source, origin, other) if each is not None)
    before = directories.check_free(Path(out), overwrite=overwrite, inputs=inputs)
    suspect, ancestor = Checkpoint.of(source), Checkpoint.of(origin)
    matching = match(suspect, ancestor)
    resets = _checked_rows(reset_rows or {}, suspect, matching)
    _check_vocabulary(suspect)
    logger.info("%s", matching.report())
    doubted = _ancestry_warnings(suspect, ancestor, matching)
    with directories.directory(Path(out), before) as folder:
        mixer = _Mixer(suspect, ancestor, matching.pairs, rho, seed, "linear" if mode == "sign-elected" else mode)
        if other is not None:
            mixer.join(Checkpoint.of(other))
        mixer.write(folder, resets, progress)
        texts = {"notes": [*notes, matching.report()], "warnings": [*warnings, *doubted]}
        paths = {"suspect": source.path, "base": origin.path}
        record = _written(folder, chosen, command, seed, seconds=time.perf_counter() - start, **texts, **paths)
        Checkpoint.of(ModelDirectory.at(folder))  # refuses files that do not belong together
    return record


def _adapter_mode(mode: Mode | Literal["sign-elected"], reset_rows: object) -> Mode:
    """The mode in which an adapter is mixed; what only whole models can be is refused."""
    if reset_rows:
        raise UnbackdoorError("`reset_rows` is for whole models; an adapter has no embeddings. Leave it out.")
    if mode == "sign-elected":
        raise UnbackdoorError(
            "`mode=sign-elected` is for whole models: an elected change is not a matrix of low rank. Merge the adapter "
            "into its base first."
        )
    return mode


def _default_method(rho: float, mode: str) -> dict[str, Any]:
    shown = f"purify_stream(rho={rho:g}, mode={mode!r})"
    return {"name": "fine-mixing", "parameters": {"rho": rho, "mode": mode}, "repr": shown}


def _written_adapter(
    folder: Path,
    model: Path,
    base: Path,
    rho: float,
    mode: Mode,
    method: dict[str, Any],
    command: str | None,
    seed: int,
    notes: Sequence[str],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Writes the mixture of an adapter; returns the content of record.json."""
    start = time.perf_counter()
    said = mix_adapter(folder, model, base, rho, mode)
    copy_companions(model, folder)
    logger.info("%s", said)
    seconds = time.perf_counter() - start
    return _written(
        folder,
        method,
        command,
        seed,
        seconds=seconds,
        notes=[*notes, said],
        warnings=[*warnings],
        suspect=model,
        base=base,
    )


def _check_setting(rho: float, mode: str, seed: int, proxy: object) -> None:
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1:
        raise UnbackdoorError(f"`rho` must be a number between 0 and 1, got {rho!r}.")
    if mode not in (*get_args(Mode), "sign-elected"):
        raise UnbackdoorError(f"`mode` must be one of {', '.join(get_args(Mode))}, sign-elected, got {mode!r}.")
    if (mode == "sign-elected") != (proxy is not None):
        raise UnbackdoorError(
            "`mode=sign-elected` goes with `proxy`, the model whose changes from the base are merged with those of the "
            "suspect. Give both, or leave both out."
        )
    check_seed(seed)


def _check_vocabulary(suspect: Checkpoint) -> None:
    """Refuse a tokenizer with more tokens than the suspect has word embeddings."""
    rows = [location.shape[0] for name, location in suspect.tensors.items() if WORDS.search(name)]
    if len(rows) == 1:
        path = suspect.directory.path
        check_rows(path, _token_count(path), rows[0])


def _ancestry_warnings(suspect: Checkpoint, base: Checkpoint, matching: Matching) -> list[str]:
    """Logs and returns reasons to doubt that the base is the suspect's ancestor; reads a sample of each matrix."""
    samples = (
        (name, _middle(suspect, name), _middle(base, counterpart))
        for name, counterpart in matching.pairs.items()
        if len(suspect.tensors[name].shape) > 1
    )
    warnings = doubts(samples, matching, suspect.shapes, base.shapes)
    output = split(matching, base)
    if output is not None:
        warnings.append(split_output(output))
    for doubt in warnings:
        logger.warning("%s", doubt)
    return warnings


def _written(folder: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Writes README.md and record.json; returns the content of the latter. See `_record`."""
    record = _record(*arguments, **options)
    (folder / "README.md").write_text(card.purified(record), encoding="utf-8")
    return write_record(folder / "record.json", record)


def _record(
    method: dict[str, Any],
    command: str | None,
    seed: int,
    *,
    seconds: float,
    notes: list[str],
    warnings: list[str],
    suspect: Path,
    base: Path,
) -> dict[str, Any]:
    """Returns the content of record.json; entries that need a model in memory are null."""
    return {
        "method": method,
        **({} if command is None else {"command": command}),
        "seed": seed,
        "versions": {
            "unbackdoor": version("unbackdoor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": f"cpu, {usable()} threads, streamed",
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "head": None,
        "clean": None,
        "recipe": None,
        "suspect_accuracy_on_clean": None,
        "purified_accuracy_on_clean": None,
        "usable": None,
        "examples_seen": 0,
        "notes": notes,
        "warnings": warnings,
        "source": {"model": last_name(suspect), "base": last_name(base), "factory": None},
        "encode": recorded_encode(suspect),
        "scores": None,
        "scores_note": "not measured: the weights were mixed on disk, and no model was built",
    }


def match(suspect: Checkpoint, base: Checkpoint) -> Matching:
    """Match the floating-point tensors of two checkpoints.

    The head of a classifier stays the suspect's, even if the base has one of the same name and shape.

    Raises:
        UnbackdoorError: the checkpoints do not belong together; see `_models.matching.matched`.
    """
    ours, theirs = suspect.shapes, base.shapes
    for name in stored_copy(suspect):
        del ours[name]  # it is mixed as what it is a copy of
    if all("Classification" in str(each.directory.config.get("architectures")) for each in (suspect, base)):
        for name in task_head(theirs):
            del theirs[name]
    matching = matched(*({_today(name): shape for name, shape in each.items()} for each in (ours, theirs)))
    our_names, their_names = ({_today(name): name for name in each} for each in (ours, theirs))
    matching = replace(
        matching,
        pairs={our_names[name]: their_names[counterpart] for name, counterpart in matching.pairs.items()},
        suspect_only=tuple(our_names[name] for name in matching.suspect_only),
        base_only=tuple(their_names[name] for name in matching.base_only),
    )
    return with_output(matching, suspect, base)


def _today(name: str) -> str:
    """Returns the name that transformers gives a tensor on loading: normalisation layers once had gamma and beta."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def moved_embeddings(suspect: ModelDirectory, base: ModelDirectory, tokens: int) -> tuple[str, Tensor]:
    """Returns the name of a suspect's word embeddings, and their change from its base, (rows, width), float32.

    Args:
        suspect: a directory with safetensors files.
        base: a directory with safetensors files.
        tokens: number of tokens of the suspect's tokenizer.

    Raises:
        UnbackdoorError: there is not one matrix that has a row for each token.
    """
    ours, theirs = Checkpoint.of(suspect), Checkpoint.of(base)
    pairs = match(ours, theirs).pairs
    names = [name for name in pairs if WORDS.search(name) and len(ours.tensors[name].shape) == 2]
    if len(names) != 1:
        raise UnbackdoorError(
            f"{suspect} has {len(names)} matrices of word embeddings that its base also has; 1 is expected. Purify it "
            "without `stream`."
        )
    name = names[0]
    location = ours.tensors[name]
    check_rows(suspect.path, tokens, location.shape[0])
    moved = ours.read(name, 0, location.count).float() - theirs.read(pairs[name], 0, location.count).float()
    return name, moved.view(location.shape)


def _token_count(source: Path) -> int:
    """Returns the number of tokens in the directory's tokenizer.json; 0 if only transformers could count them."""
    path = source / "tokenizer.json"
    if not path.exists():
        return 0
    content = read_json(path)
    try:
        words = content["model"]["vocab"]
        numbers = words.values() if isinstance(words, dict) else range(len(words))
        added = (entry["id"] for entry in content.get("added_tokens") or ())
        return 1 + max(int(number) for number in (*numbers, *added))
    except (KeyError, TypeError, ValueError):
        return 0


def _checked_rows(
    rows: Mapping[str, Sequence[int]], suspect: Checkpoint, matching: Matching
) -> dict[str, Sequence[int]]:
    for name, numbers in rows.items():
        shape = suspect.tensors[name].shape if name in matching.pairs else ()
        if len(shape) != 2:
            raise UnbackdoorError(f"reset_rows must name matrices that model and base have in common, got {name}.")
        outside = [number for number in numbers if not 0 <= number < shape[0]]
        if outside:
            raise UnbackdoorError(f"`reset_rows` of {name} must be from 0 to {shape[0] - 1:,}, got {outside[0]}.")
    return dict(rows)


def _middle(checkpoint: Checkpoint, name: str) -> Tensor:
    """Returns some numbers from the middle of a matrix, (1, count)."""
    count = checkpoint.tensors[name].count
    size = min(count, SAMPLE)
    return checkpoint.read(name, (count - size) // 2, size)[None]


class _Mixer:
    """Writes shards: each piece of a tensor is read, mixed, checked and written by one of the threads."""

    def __init__(
        self, suspect: Checkpoint, base: Checkpoint, pairs: Mapping[str, str], rho: float, seed: int, mode: Mode
    ) -> None:
        self.suspect, self.base = suspect, base
        self.copies = stored_copy(suspect)
        self.pairs = {**pairs, **{copy: pairs[name] for copy, name in self.copies.items() if name in pairs}}
        self.rho, self.seed, self.mode = rho, seed, mode
        self.proxy: Checkpoint | None = None
        self.partners: dict[str, str] = {}  # names in the proxy by those in the suspect
        self.writing = threading.Lock()  # the threads share one file, and its position
        self.memory = threading.local()  # allocated once per thread: new pages cost as much time as the mask

    def join(self, proxy: Checkpoint) -> None:
        """Merge with the changes of another model as well.

        Raises:
            UnbackdoorError: it lacks a tensor that is to be merged.
        """
        try:
            partners = match(self.suspect, proxy).pairs
        except UnbackdoorError:
            raise UnbackdoorError(
                f"`proxy` {proxy.directory} has other tensors than the suspect. Take a model that was tuned from the "
                "same base."
            ) from None
        partners |= {copy: partners[name] for copy, name in self.copies.items() if name in partners}
        lacking = [name for name in self.pairs if name not in partners]
        if lacking:
            raise UnbackdoorError(
                f"`proxy` {proxy.directory} lacks {few(lacking)}, which suspect and base have. Take a model that was "
                "tuned from the same base."
            )
        self.proxy, self.partners = proxy, partners

    def write(self, folder: Path, resets: Mapping[str, Sequence[int]], progress: bool) -> None:
        """Write all files of the suspect."""
        source = self.suspect.directory
        with (bar if progress else silent)("mixing", len(source.weights.files)) as advance:
            for file in source.weights.files:
                self.write_shard(file, folder / file.name, resets)
                advance()
        copy_companions(source.path, folder)
        if source.weights.index is not None:
            shutil.copyfile(source.weights.index, folder / source.weights.index.name)

    def write_shard(self, file: Path, target: Path, resets: Mapping[str, Sequence[int]]) -> None:
        """Write one file of the suspect, with the same header, so each tensor keeps its place."""
        before = header_bytes(file)
        pieces = [
            (name, index)
            for name, location in self.suspect.tensors.items()
            if location.file == file
            for index in masks.chunks(location.count if location.dtype is not None else location.end - location.begin)
        ]
        shares = self._arcs(file) if self.mode == "spherical" else {}
        cuts = {} if self.proxy is None else self._cuts(file)
        with target.open("wb") as opened:
            opened.write(before)
            masks.each(
                lambda piece: self._write_piece(opened, *piece, shares.get(piece[0]), cuts.get(piece[0])), pieces
            )
            copied = {copy: resets[name] for copy, name in self.copies.items() if name in resets}
            for name, rows in {**resets, **copied}.items():
                if self.suspect.tensors[name].file == file:
                    self._write_rows(opened, name, rows)

    def _arcs(self, file: Path) -> dict[str, tuple[float, float] | None]:
        """The factors of the two models in each tensor of a file of the suspect; see `masks.arc`."""
        names = [
            name for name, location in self.suspect.tensors.items() if location.file == file and name in self.pairs
        ]
        pieces = [(name, index) for name in names for index in masks.chunks(self.suspect.tensors[name].count)]
        products: dict[tuple[str, int], tuple[float, float, float]] = {}

        def measure(piece: tuple[str, int]) -> None:
            name, start = piece[0], piece[1] * CHUNK
            location = self.suspect.tensors[name]
            assert location.dtype is not None
            count = min(CHUNK, location.count - start)
            numbers = self.suspect.read(name, start, count, self._buffer("suspect"))
            products[piece] = masks.products(numbers, self._of_base(self.pairs[name], start, count, location.dtype))

        masks.each(measure, pieces)
        return {name: masks.arc([products[piece] for piece in pieces if piece[0] == name], self.rho) for name in names}

    def _cuts(self, file: Path) -> dict[str, tuple[Cut, Cut]]:
        """The numbers that stay of the two changes of each tensor of a file of the suspect."""
        cuts = {}
        for name in self.pairs:
            location = self.suspect.tensors[name]
            if location.file == file:
                pieces, kept = masks.chunks(location.count), round(self.rho * location.count)
                first, second = (partial(self._change, name, which) for which in (1, 2))
                cuts[name] = cut(first, pieces, kept), cut(second, pieces, kept)
        return cuts

    def _change(self, name: str, which: int, index: int) -> Tensor:
        return self._changes(name, index)[which]

    def _changes(self, name: str, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """A piece of the base, and of the changes of the suspect and of the proxy from it, in float32 or float64."""
        location = self.suspect.tensors[name]
        assert location.dtype is not None
        assert self.proxy is not None
        start = index * CHUNK
        count = min(CHUNK, location.count - start)
        exact = torch.float64 if location.dtype == torch.float64 else torch.float32
        base, suspect, proxy = (
            self._fitting(checkpoint, each, start, count, location.dtype, what).to(exact)
            for checkpoint, each, what in (
                (self.base, self.pairs[name], "base"),
                (self.suspect, name, "suspect"),
                (self.proxy, self.partners[name], "proxy"),
            )
        )
        return base, suspect - base, proxy - base

    def _write_piece(
        self,
        target: BinaryIO,
        name: str,
        index: int,
        shares: tuple[float, float] | None,
        cuts: tuple[Cut, Cut] | None,
    ) -> None:
        location = self.suspect.tensors[name]
        size = 1 if location.dtype is None else location.dtype.itemsize
        start = index * CHUNK
        count = min(CHUNK, (location.end - location.begin) // size - start)
        numbers = self.suspect.read(name, start, count, self._buffer("suspect"))
        other = self.pairs.get(name)
        if cuts is not None:
            assert location.dtype is not None
            base, *changes = self._changes(name, index)
            mixed = self._buffer("mixed")[: count * size].view(location.dtype)
            mix_(mixed, base, changes, cuts, index)
            numbers = mixed
        elif other is not None:
            assert location.dtype is not None
            counterpart = self._of_base(other, start, count, location.dtype)
            mixed = self._buffer("mixed")[: count * size].view(location.dtype)
            drawn = _today(self.copies.get(name, name))
            masks.mix_chunk_(mixed, numbers, counterpart, drawn, index, self.rho, self.seed, self.mode, shares)
            numbers = mixed
        with self.writing:
            write(target, numbers, location.begin + start * size)

    def _write_rows(self, target: BinaryIO, name: str, rows: Sequence[int]) -> None:
        location = self.suspect.tensors[name]
        assert location.dtype is not None
        width = location.shape[1]
        for row in rows:
            numbers = self._of_base(self.pairs[name], row * width, width, location.dtype)
            write(target, numbers.to(location.dtype), location.begin + row * width * location.dtype.itemsize)

    def _of_base(self, name: str, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Returns some numbers of the base, in its own type, that are also finite in the suspect's type."""
        return self._fitting(self.base, name, start, count, dtype, "base")

    def _fitting(
        self, checkpoint: Checkpoint, name: str, start: int, count: int, dtype: torch.dtype, what: str
    ) -> Tensor:
        numbers = checkpoint.read(name, start, count, self._buffer(what))
        if numbers.dtype != dtype and not finite(numbers.to(dtype)):
            location = checkpoint.tensors[name]
            raise UnbackdoorError(
                f"{location.file} has values in {name} that are too large for the model's {str(dtype)[6:]}. Take a "
                f"{what} of that type."
            )
        return numbers

    def _buffer(self, name: str) -> Tensor:
        memory: Tensor | None = getattr(self.memory, name, None)
        if memory is None:
            memory = torch.empty(8 * CHUNK, dtype=torch.uint8)
            setattr(self.memory, name, memory)
        return memory
