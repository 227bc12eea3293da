"""Mixing an adapter on disk: with its base, which is a smaller alpha, or with another adapter of that base."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._mixing.masks import Mode, arc
from unbackdoor._models.adapters import (
    CONFIG_FILE,
    EMBEDDINGS,
    OUTPUTS,
    WEIGHTS_FILE,
    AdapterFiles,
    adapter_files,
    is_adapter,
    write_adapter,
)
from unbackdoor._models.directory import ModelDirectory

Pair = tuple[Tensor, Tensor]  # A, (rank, inputs), and B, (outputs, rank)


def mix_adapter(folder: Path, model: Path, base: Path, rho: float, mode: Mode) -> str:
    """Write the mixture of an adapter with its base or with another adapter.

    Args:
        folder: an existing, empty directory.
        model: directory of the suspect, an adapter.
        base: directory of the model below it; or of another adapter of that model.
        rho: share of the suspect, in [0, 1].
        mode: `linear`; between two adapters also `spherical`, each layer's change taken as a vector.

    Returns:
        a sentence on what was mixed.

    Raises:
        UnbackdoorError: a file is damaged, the mode cannot be held by an adapter, or the two do not belong together.
    """
    if is_adapter(base):
        suspect = adapter_files(model)
        other = adapter_files(base)
        _check_partner(suspect, other)
        if mode not in ("linear", "spherical"):
            raise UnbackdoorError(
                f"`mode` must be linear or spherical to mix two adapters, got {mode!r}: single coordinates of a change "
                "are not a matrix of low rank."
            )
        write_adapter(folder, suspect.config, _mixed(suspect, other, rho, mode))
        return f"{len({*suspect.factors, *other.factors})} layers of two adapters were mixed; their ranks add up."
    if mode != "linear":
        raise UnbackdoorError(
            f"`mode` must be linear to mix an adapter with its base, got {mode!r}: every other mixture changes the "
            "base as well. Merge the adapter into its base first."
        )
    beneath = ModelDirectory.of(base, "`base`")
    suspect = adapter_files(model, beneath.weights)
    _check_base(suspect, beneath)
    shutil.copyfile(model / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_scaled(suspect.config, rho), indent=2) + "\n", encoding="utf-8")
    adapter_files(folder, beneath.weights)  # refuses files that cannot be read again
    return f"{len(suspect.factors)} layers of the adapter keep {rho:g} of their alpha; its matrices are unchanged."


def _scaled(config: Mapping[str, Any], rho: float) -> dict[str, Any]:
    """The config with a smaller alpha at each layer."""
    alphas = {name: rho * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()}
    return {**config, "lora_alpha": rho * config.get("lora_alpha", 8), "alpha_pattern": alphas}


def _mixed(suspect: AdapterFiles, other: AdapterFiles, rho: float, mode: Mode) -> dict[str, Pair]:
    """The factors of each layer at scale 1, of the suspect's type; a layer of one adapter alone is scaled."""
    mixed = {}
    for name in sorted({*suspect.factors, *other.factors}):
        parts: list[tuple[float, Pair]] = []
        shares = rho, 1 - rho
        if mode == "spherical" and name in suspect.factors and name in other.factors:
            shares = arc([_products(suspect, other, name)], rho) or shares
        for share, adapter in zip(shares, (suspect, other), strict=True):
            if name in adapter.factors:
                parts.append((share * adapter.scales[name], adapter.factors[name]))
        dtype = next(iter(suspect.factors.values()))[0].dtype
        mixed[name] = concatenated(parts, dtype)
    return mixed


def concatenated(parts: list[tuple[float, Pair]], dtype: torch.dtype) -> Pair:
    """Returns the factors of a sum of products of factors, whose ranks add up.

    Args:
        parts: for each product B A its share, and A, (rank, inputs), and B, (outputs, rank).
        dtype: type of the result.
    """
    roots = [abs(share) ** 0.5 for share, _ in parts]
    signs = [-1.0 if share < 0 else 1.0 for share, _ in parts]
    down = [root * first.double() for root, (_, (first, _)) in zip(roots, parts, strict=True)]
    up = [sign * root * second.double() for sign, root, (_, (_, second)) in zip(signs, roots, parts, strict=True)]
    return torch.cat(down).to(dtype), torch.cat(up, dim=1).to(dtype)


def _products(suspect: AdapterFiles, other: AdapterFiles, name: str) -> tuple[float, float, float]:
    """The inner products of a layer's two changes, taken as vectors, from their factors alone; see `masks.products`."""
    (a1, b1), (a2, b2) = (tuple(each.double() for each in adapter.factors[name]) for adapter in (suspect, other))
    s1, s2 = suspect.scales[name], other.scales[name]

    def product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
        return float(((b.T @ d) * (a @ c.T)).sum())

    return s1 * s1 * product(a1, b1, a1, b1), s2 * s2 * product(a2, b2, a2, b2), s1 * s2 * product(a1, b1, a2, b2)


def _check_partner(suspect: AdapterFiles, other: AdapterFiles) -> None:
    """Refuse an adapter whose layers have other shapes, or that was made for another base."""
    if bool(suspect.config.get("fan_in_fan_out")) != bool(other.config.get("fan_in_fan_out")):
        raise UnbackdoorError(
            f"{other.path} is not an adapter of the model that {suspect.path} is for: fan_in_fan_out."
        )
    common = [name for name in suspect.factors if name in other.factors]
    odd = [name for name in common if _sides(suspect.factors[name]) != _sides(other.factors[name])]
    if odd or not common:
        what = f"{printable(odd[0])} has another shape" if odd else "they have no layer in common"
        raise UnbackdoorError(f"{other.path} is not an adapter of the model that {suspect.path} is for: {what}.")
    ours, theirs = (str(each.config.get("base_model_name_or_path")) for each in (suspect, other))
    if Path(ours).name != Path(theirs).name:
        raise UnbackdoorError(
            f"{other.path} names {printable(theirs)} as its base, {suspect.path} {printable(ours)}; only adapters of "
            "one model can be mixed."
        )


def _sides(pair: Pair) -> tuple[int, int]:
    return pair[1].shape[0], pair[0].shape[1]


def _check_base(suspect: AdapterFiles, base: ModelDirectory) -> None:
    """Refuse a base that lacks a layer of the adapter, by the heads of its files."""
    shapes = {name: location.shape for each in base.weights.locations.values() for name, location in each.items()}
    ours = {f"{name}.weight": sorted(_sides(pair)) for name, pair in suspect.factors.items()}
    tied = next((shape for name, shape in shapes.items() if name.endswith(EMBEDDINGS)), ())
    shapes = {**{name: tied for name in ours if name.startswith(OUTPUTS)}, **shapes}  # files leave out a tied output
    bare = {name: shapes.get(name, shapes.get(name.partition(".")[2], ())) for name in ours}  # GPT-2 leaves a part out
    odd = [name for name, sides in ours.items() if sorted(bare[name]) != sides]
    if odd:
        raise UnbackdoorError(
            f"{suspect.path} does not fit `base`: {few(odd)} {'is' if len(odd) == 1 else 'are'} not in it, or of "
            "another shape. Give the model that it was trained on."
        )
