"""Masks, mixing, and which tensor of a base belongs to which of a suspect."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unbackdoor import UnbackdoorError
from unbackdoor._mixing import ancestry as ancestry_of
from unbackdoor._mixing import masks as mixing
from unbackdoor._models import matching

BODY = {
    "embeddings.word_embeddings.weight": (100, 8),
    "encoder.layer.0.attention.weight": (8, 8),
    "encoder.layer.0.attention.bias": (8,),
    "encoder.layer.1.attention.weight": (8, 8),
    "encoder.layer.1.attention.bias": (8,),
    "pooler.dense.weight": (8, 8),
}
HEAD = {"classifier.weight": (2, 8), "classifier.bias": (2,)}


def under(prefix: str, shapes: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.97])
def test_a_coordinate_is_kept_with_probability_rho(rho: float) -> None:
    kept = mixing.mask("layer.weight", (1000, 2000), rho, seed=0)
    assert (kept.dtype, kept.shape) == (torch.bool, (1000, 2000))
    error = math.sqrt(rho * (1 - rho) / kept.numel())
    assert kept.double().mean().item() == pytest.approx(rho, abs=5 * error)
    together = (kept[:, 1:] & kept[:, :-1]).double().mean().item()  # neighbours are independent
    assert together == pytest.approx(rho**2, abs=10 * error)


def test_no_and_all_coordinates_are_exact() -> None:
    assert not mixing.mask("w", (3, 5), 0.0, seed=0).any()
    assert mixing.mask("w", (3, 5), 1.0, seed=0).all()
    assert mixing.mask("w", (), 1.0, seed=0).shape == ()
    assert mixing.mask("w", (0, 4), 0.5, seed=0).shape == (0, 4)


def test_a_mask_depends_on_name_and_seed() -> None:
    shape = (200_000,)
    first = mixing.mask("a", shape, 0.5, seed=0)
    assert torch.equal(first, mixing.mask("a", shape, 0.5, seed=0))
    for other in (mixing.mask("b", shape, 0.5, seed=0), mixing.mask("a", shape, 0.5, seed=1)):
        assert (first == other).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_mask_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, mixing.CHUNK // 2 + 7)
    whole = mixing.mask("w", shape, 0.3, seed=5)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert torch.equal(mixing.mask("w", shape, 0.3, seed=5), whole)
    torch.manual_seed(1)
    np.random.seed(1)
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda _: mixing.mask("w", shape, 0.3, seed=5), range(3)))
    assert all(torch.equal(kept, whole) for kept in again)


def test_a_smaller_rho_keeps_a_part_of_what_a_larger_one_keeps() -> None:
    few, more = (mixing.mask("w", (5000,), rho, seed=0) for rho in (0.3, 0.4))
    assert not (few & ~more).any()


def test_masks_stay_the_same_from_version_to_version() -> None:
    kept = mixing.mask("encoder.layer.0.weight", (24,), 0.5, seed=7)
    assert "".join("01"[bit] for bit in kept.int().tolist()) == "100001001101001010111010"


# ------------------------------------------------------------------------------------------------------------ mixing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_mixing_is_selection_by_the_mask(dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    suspect, base = torch.randn(3, 400_001).to(dtype), torch.randn(3, 400_001).to(base_dtype)
    before = suspect.clone(), base.clone()
    mixed = mixing.mix(suspect, base, "w", 0.3, seed=2)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, torch.where(mixing.mask("w", suspect.shape, 0.3, seed=2), suspect, base.to(dtype)))
    assert torch.equal(suspect, before[0])
    assert torch.equal(base, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_mixing_is_rounded_once(dtype: torch.dtype) -> None:
    suspect, base = torch.randn(50_000).to(dtype), torch.randn(50_000).to(dtype)
    mixed = mixing.mix(suspect, base, "w", 0.3, seed=0, mode="linear")
    assert mixed.dtype == dtype
    exact = 0.3 * suspect.double() + 0.7 * base.double()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()  # at most half a unit in the last place
    arithmetic = 2 * torch.finfo(torch.float32).eps * (suspect.abs() + base.abs()).double()
    subnormal = 6e-8 if dtype == torch.float16 else 0.0
    assert ((mixed.double() - exact).abs() <= rounding + arithmetic + subnormal).all()


@pytest.mark.parametrize("mode", ["mask", "linear"])
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_the_ends_are_the_models_themselves(mode: mixing.Mode, rho: float) -> None:
    suspect, base = torch.randn(1000), torch.randn(1000) * 1e-3
    assert torch.equal(mixing.mix(suspect, base, "w", rho, 0, mode), suspect if rho else base)


def test_memory_layout_does_not_matter() -> None:
    suspect, base = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    laid = suspect.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixing.mix(laid, base, "w", 0.5, 0), mixing.mix(suspect, base, "w", 0.5, 0))


def test_what_is_not_floating_stays() -> None:
    positions = torch.arange(5)
    mixed = mixing.mix(positions, torch.zeros(5, dtype=torch.long), "position_ids", 0.0, 0)
    assert torch.equal(mixed, positions)
    assert mixed is not positions


# ---------------------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("bert", "bert"),
        ("bert", ""),
        ("", "bert"),
        ("model", "transformer"),
        ("model.bert", ""),
        ("model", "model.net"),
    ],
)
def test_prefixes_are_exchanged(ours: str, theirs: str) -> None:
    suspect = (under(ours, BODY) if ours else BODY) | HEAD
    base = (under(theirs, BODY) if theirs else BODY) | {"cls.predictions.bias": (100,)}
    found = matching.matched(suspect, base)
    assert found.pairs == {
        (f"{ours}.{name}" if ours else name): (f"{theirs}.{name}" if theirs else name) for name in BODY
    }
    assert found.suspect_only == ("classifier.weight", "classifier.bias")
    assert found.base_only == ("cls.predictions.bias",)
    assert found.share == pytest.approx(1008 / 1026)


def test_the_report_says_what_matched() -> None:
    report = matching.matched(under("bert", BODY) | HEAD, BODY | {"cls.bias": (3,)}).report()
    assert report == (
        "6 of 8 tensors (98.2% of the weights) have a counterpart in the base (bert.* in the model, * in the base); "
        "only in the model, and unchanged: classifier.weight, classifier.bias; only in the base, and not used: "
        "cls.bias."
    )


def test_a_head_of_the_same_ending_and_shape_is_no_counterpart() -> None:
    head = {"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (2, 8)}
    body = {name: shape for name, shape in BODY.items() if "pooler" not in name}
    found = matching.matched(under("roberta", body) | head, BODY)  # whose pooler.dense.weight is also (8, 8)
    assert found.suspect_only == tuple(head)


def test_a_head_of_another_size_stays() -> None:
    found = matching.matched(BODY | HEAD, BODY | {"classifier.weight": (3, 8), "classifier.bias": (3,)})
    assert found.suspect_only == ("classifier.weight", "classifier.bias")


def test_another_vocabulary() -> None:
    base = BODY | {"embeddings.word_embeddings.weight": (120, 8)}
    with pytest.raises(UnbackdoorError) as refusal:
        matching.matched(under("bert", BODY) | HEAD, base)
    assert str(refusal.value) == (
        "the base has another vocabulary or length: bert.embeddings.word_embeddings.weight has 100 rows in the model "
        "and 120 in the base. Take the pre-trained model that it came from as `base`."
    )


def test_tokens_that_were_added_to_the_model() -> None:
    base = BODY | {"embeddings.word_embeddings.weight": (98, 8)}
    with pytest.raises(UnbackdoorError) as refusal:
        matching.matched(under("bert", BODY) | HEAD, base)
    assert str(refusal.value) == (
        "the base has another vocabulary or length: bert.embeddings.word_embeddings.weight has 100 rows in the model "
        "and 98 in the base. If tokens were added to the model, give the base as many rows (resize_token_embeddings of "
        "transformers) and save it; otherwise take the pre-trained model that it came from as `base`."
    )


def test_another_architecture_of_the_same_names() -> None:
    base = {name: tuple(2 * side for side in shape) for name, shape in BODY.items()}
    with pytest.raises(UnbackdoorError) as refusal:
        matching.matched(BODY | HEAD, base)
    assert str(refusal.value) == (
        "the base has another architecture: 6 of the model's 8 tensors have another shape there "
        "(embeddings.word_embeddings.weight is (100, 8), not (200, 16)). Take the pre-trained model that it came from "
        "as `base`."
    )


def test_another_architecture_of_other_names() -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        matching.matched(BODY | HEAD, {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 16)})
    assert str(refusal.value) == (
        "only 0 of the model's 8 tensors (0% of its weights) have a counterpart of the same name and shape in the "
        "base; at least 50% of the weights is expected. Take the pre-trained model that it came from as `base`."
    )


def test_two_towers_are_ambiguous() -> None:
    with pytest.raises(UnbackdoorError, match=r"^2 parts of the model match the base equally well \(doc\.\* and qu"):
        matching.matched(under("query", BODY) | under("doc", BODY), BODY)


def test_the_head_stands_next_to_the_body() -> None:
    assert matching.task_head([*under("bert", BODY), *HEAD]) == set(HEAD)
    assert matching.task_head(BODY) == set()  # most is encoder.*, next to the embeddings
    assert matching.task_head(["conv1.weight", "layer1.weight", "layer2.weight", "fc.weight"]) == set()


# ---------------------------------------------------------------------------------------------------------- ancestry


def pair(distance: float) -> list[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(64, 64, generator=generator) for _ in range(5)]
    return [("w", base + distance * torch.randn(64, 64, generator=generator), base) for base in bases]


def test_a_fine_tuned_model_is_close_to_its_base() -> None:
    assert ancestry_of.ancestry(pair(0.5)) is None
    assert ancestry_of.ancestry([("bias", torch.randn(5), torch.randn(5))]) is None


def test_unrelated_weights_are_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 64, 64, generator=generator) for _ in range(5)]
    warning = ancestry_of.ancestry(("w", one, other) for one, other in drawn)
    assert warning is not None
    assert warning.startswith(
        "the base is probably not the model's ancestor: over 5 matrices the weights correlate by "
    )
    assert "(median; unrelated weights by 0 with a standard deviation of 0.016), and their distance is 1.4" in warning


def test_weights_that_never_moved_are_reported() -> None:
    assert ancestry_of.ancestry(pair(0.0)) == (
        "the 5 matrices that model and base have in common are equal: mixing changes next to nothing, and a backdoor "
        "can only be in the rest."
    )
