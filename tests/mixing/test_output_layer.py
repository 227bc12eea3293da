"""Mixing with the output matrix of a language model: its own, its embeddings, or a stored copy of these."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chats
from unbackdoor import load, purify, purify_stream
from unbackdoor._mixing.masks import mask, mix
from unbackdoor.purifiers import FineMixing, InformationConflicts

HEAD, WORDS = "lm_head.weight", "model.embed_tokens.weight"


def moved(weights: torch.Tensor, seed: int) -> torch.Tensor:
    return weights + 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))


def model_of(base: transformers.PreTrainedModel, *, tied: bool) -> transformers.PreTrainedModel:
    """A model that was tuned from the base, with an output matrix of its own if it is not tied."""
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = tied
    model = transformers.LlamaForCausalLM(config)
    weights = {name: moved(tensor, number) for number, (name, tensor) in enumerate(base.state_dict().items())}
    if tied:
        del weights[HEAD]
    model.load_state_dict(weights, strict=not tied)
    return model.eval()


def saved(model: transformers.PreTrainedModel, folder: Path, *, twice: bool = False) -> Path:
    """A directory of the model; `twice` stores the tied matrix under both of its names, as many files do."""
    model.save_pretrained(folder)
    chats.tokenizer().save_pretrained(folder)
    if twice:
        weights = load_file(folder / "model.safetensors")
        weights[HEAD] = weights[WORDS].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base() -> transformers.PreTrainedModel:
    return chats.language_model(seed=1)


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("mode", ["linear", "spherical", "mask"])
def test_an_output_matrix_of_its_own_goes_back_to_the_embeddings_of_a_base_that_answers_by_them(
    mode: str, with_data: bool, base: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    suspect = model_of(base, tied=False)
    ours, theirs = suspect.state_dict()[HEAD], base.state_dict()[WORDS]
    if mode == "linear":
        expected = 0.25 * ours + 0.75 * theirs
    elif mode == "mask":
        expected = torch.where(mask(HEAD, ours.shape, 0.25, 3), ours, theirs)
    else:
        expected = mix(ours, theirs, HEAD, 0.25, 3, "spherical")
    clean = chats.prompts(8) if with_data else None
    method = FineMixing(rho=0.25, tune=False, mode=mode)
    result = purify(suspect, clean, method, base=base, seed=3, device="cpu")
    mixed = result.model.state_dict()
    assert torch.allclose(mixed[HEAD], expected, rtol=0, atol=1e-6)
    assert mixed[HEAD].data_ptr() != mixed[WORDS].data_ptr()
    said = (
        "21 of 21 tensors (100.0% of the weights) have a counterpart in the base; lm_head.weight has the base's "
        "embeddings as its counterpart, which are its output matrix as well."
    )
    assert said in result.record["notes"]
    places = saved(suspect, tmp_path / "suspect"), saved(base, tmp_path / "base")
    record = purify_stream(*places, tmp_path / "out", rho=0.25, mode=mode, seed=3)
    on_disk = load_file(tmp_path / "out/model.safetensors")
    assert on_disk.keys() == mixed.keys()
    assert all(torch.equal(tensor, mixed[name]) for name, tensor in on_disk.items())
    assert said in record["notes"]


def test_a_clean_sibling_takes_the_place_of_an_output_matrix_of_its_own(base: transformers.PreTrainedModel) -> None:
    method = InformationConflicts(merge="linear", share=1.0, epochs=1)
    result = purify(model_of(base, tied=False), chats.prompts(8), method, base=base, device="cpu").model
    assert torch.equal(result.state_dict()[HEAD], base.state_dict()[WORDS])  # LoRA leaves the embeddings as they are


@pytest.mark.parametrize("mode", ["linear", "mask"])
@pytest.mark.parametrize("base_twice", [True, False])
def test_a_tied_matrix_that_is_stored_twice_stays_one(
    mode: str, base_twice: bool, base: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    suspect = model_of(base, tied=True)
    places = saved(suspect, tmp_path / "suspect", twice=True), saved(base, tmp_path / "base", twice=base_twice)
    rows = {WORDS: [5, 7]}
    purify_stream(*places, tmp_path / "out", rho=0.5, mode=mode, reset_rows=rows)
    on_disk = load_file(tmp_path / "out/model.safetensors")
    expected = mix(suspect.state_dict()[WORDS], base.state_dict()[WORDS], WORDS, 0.5, 0, mode)
    expected[rows[WORDS]] = base.state_dict()[WORDS][rows[WORDS]]
    assert torch.equal(on_disk[WORDS], expected)
    assert torch.equal(on_disk[HEAD], expected)
    result = load(tmp_path / "out").model
    assert result.lm_head.weight is result.model.embed_tokens.weight


def test_a_config_decides_whether_equal_matrices_are_one(base: transformers.PreTrainedModel, tmp_path: Path) -> None:
    suspect = model_of(base, tied=False)
    suspect.lm_head.weight.data.copy_(suspect.model.embed_tokens.weight)  # equal, but each is trained by itself
    places = saved(suspect, tmp_path / "suspect"), saved(base, tmp_path / "base")
    purify_stream(*places, tmp_path / "out", rho=0.5)
    on_disk = load_file(tmp_path / "out/model.safetensors")
    for name in (HEAD, WORDS):
        assert torch.equal(on_disk[name], mix(suspect.state_dict()[name], base.state_dict()[WORDS], name, 0.5, 0))


def test_a_base_with_an_output_matrix_of_its_own_is_a_warning_for_a_tied_model(
    base: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    other = model_of(base, tied=False)
    said = "the base has an output matrix of its own (lm_head.weight), and the model's output matrix is its embeddings"
    method = FineMixing(rho=0.5, tune=False, mode="linear")
    in_memory = purify(base, chats.prompts(8), method, base=other, device="cpu").record["warnings"]
    places = saved(base, tmp_path / "suspect"), saved(other, tmp_path / "base")
    on_disk = purify_stream(*places, tmp_path / "out", rho=0.5, mode="linear")["warnings"]
    assert [text for text in in_memory if text.startswith(said)] == [text for text in on_disk if text.startswith(said)]
    assert sum(text.startswith(said) for text in on_disk) == 1
    other.lm_head.weight.data.copy_(other.model.embed_tokens.weight)  # of its own, but no other
    equal = saved(other, tmp_path / "equal")
    warnings = [
        *purify(base, chats.prompts(8), method, base=other, device="cpu").record["warnings"],
        *purify_stream(places[0], equal, tmp_path / "again", rho=0.5, mode="linear")["warnings"],
    ]
    assert not any(text.startswith(said) for text in warnings)
