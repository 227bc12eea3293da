"""Adapters mixed on disk: against whole matrices, and as peft loads the result."""

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chats
from unbackdoor import UnbackdoorError, load, purify_stream
from unbackdoor._cli.commands.stream import purify_on_disk
from unbackdoor._cli.options import PurifyOptions
from unbackdoor.purifiers import EPUR, FineMixing, Then

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QUERY, DOWN, UP = (f"model.layers.1.{part}" for part in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"))


def made(place: Path, name: str, seed: int, **settings: object) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.1)
    adapted.save_pretrained(place / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with two adapters of other ranks and scales; two of their layers are the same."""
    folder = tmp_path_factory.mktemp("adapters")
    chats.language_model().save_pretrained(folder / "base")
    chats.tokenizer().save_pretrained(folder / "base")
    made(folder, "one", 0, r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 2})
    made(folder, "two", 1, r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    return folder


def changes(place: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The change of each layer, by peft's own merging."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    whole = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return {name.removesuffix(".weight"): (whole[name] - before[name]).double() for name in before}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=2e-6)


def test_with_its_base_an_adapter_gets_a_smaller_alpha(place: Path, tmp_path: Path) -> None:
    record = purify_stream(place / "one", place / "base", tmp_path / "out", rho=0.25, mode="linear")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (3, {"q_proj": 0.5})
    matrices = [load_file(folder / "adapter_model.safetensors") for folder in (place / "one", tmp_path / "out")]
    assert all(torch.equal(tensor, matrices[1][name]) for name, tensor in matrices[0].items())
    before, after = (changes(place, folder) for folder in (place / "one", tmp_path / "out"))
    assert all(close(after[name], 0.25 * change) for name, change in before.items())
    assert record["notes"] == ["4 layers of the adapter keep 0.25 of their alpha; its matrices are unchanged."]
    ours = load(tmp_path / "out", base=place / "base").model(**chats.prompts(2).inputs(slice(None))).logits
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("mode", ["linear", "spherical"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_two_adapters_give_one_whose_ranks_add_up(place: Path, tmp_path: Path, mode: str, rho: float) -> None:
    purify_stream(place / "one", place / "two", tmp_path / "out", rho=rho, mode=mode)
    one, two, both = (changes(place, folder) for folder in (place / "one", place / "two", tmp_path / "out"))
    matrices = load_file(tmp_path / "out/adapter_model.safetensors")
    assert matrices[f"base_model.model.{QUERY}.lora_A.weight"].shape[0] == 6
    assert close(both[DOWN], rho * one[DOWN])  # of one adapter alone
    assert close(both[UP], (1 - rho) * two[UP])
    shares = rho, 1 - rho
    if mode == "spherical" and rho not in (0, 1):
        a, b = one[QUERY].flatten(), two[QUERY].flatten()
        angle = math.acos(float(a @ b / (a.norm() * b.norm())))
        shares = math.sin(rho * angle) / math.sin(angle), math.sin((1 - rho) * angle) / math.sin(angle)
    assert close(both[QUERY], shares[0] * one[QUERY] + shares[1] * two[QUERY])


def test_what_an_adapter_cannot_hold_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError, match="`mode` must be linear to mix an adapter with its base, got 'spherical'"):
        purify_stream(place / "one", place / "base", tmp_path / "out", rho=0.5, mode="spherical")
    with pytest.raises(UnbackdoorError, match="`mode` must be linear or spherical to mix two adapters, got 'mask'"):
        purify_stream(place / "one", place / "two", tmp_path / "out", rho=0.5)
    with pytest.raises(UnbackdoorError, match="`reset_rows` is for whole models"):
        purify_stream(place / "one", place / "base", tmp_path / "out", rho=0.5, mode="linear", reset_rows={"a": [0]})
    options = PurifyOptions(out=str(tmp_path / "out"), base=str(place / "base"), stream=True)
    with pytest.raises(UnbackdoorError, match="--stream of an adapter takes fine-mixing alone"):
        purify_on_disk(str(place / "one"), Then(EPUR(), FineMixing(rho=0.5, tune=False)), options, None)
    assert not (tmp_path / "out").exists()


def changed(place: Path, folder: Path, **entries: object) -> Path:
    shutil.copytree(place / "two", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **entries}))
    return folder


def test_what_does_not_belong_together_is_refused(place: Path, tmp_path: Path) -> None:
    wide = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=200)
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(UnbackdoorError, match=r"one does not fit `base`: .* are not in it, or of another shape"):
        purify_stream(place / "one", tmp_path / "wide", tmp_path / "out", rho=0.5, mode="linear")
    other = changed(place, tmp_path / "other", base_model_name_or_path="another")
    with pytest.raises(UnbackdoorError, match=r"other names another as its base, .*only adapters of one model"):
        purify_stream(place / "one", other, tmp_path / "out", rho=0.5, mode="linear")
    turned = changed(place, tmp_path / "turned", fan_in_fan_out=True)
    with pytest.raises(UnbackdoorError, match=r"turned is not an adapter of the model that .* fan_in_fan_out"):
        purify_stream(place / "one", turned, tmp_path / "out", rho=0.5, mode="linear")
    made(place, "three", 2, r=2, target_modules=["k_proj"])
    with pytest.raises(UnbackdoorError, match="they have no layer in common"):
        purify_stream(place / "one", place / "three", tmp_path / "out", rho=0.5, mode="linear")


def with_whole(place: Path, folder: Path, change: float = 0.0) -> Path:
    """The first adapter with the embeddings and the output layer of its base, as peft stores them with some."""
    shutil.copytree(place / "one", folder)
    rows = transformers.AutoModelForCausalLM.from_pretrained(place / "base").get_input_embeddings().weight.detach()
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[f"base_model.model.{name}"] = rows.clone() + change * (name == "lm_head.weight")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_copies_of_the_weights_of_the_base_are_no_hindrance(place: Path, tmp_path: Path) -> None:
    suspect = with_whole(place, tmp_path / "whole")  # the files of the base have no lm_head: it is the embeddings
    record = purify_stream(suspect, place / "base", tmp_path / "out", rho=0.25, mode="linear")
    assert record["notes"] == ["4 layers of the adapter keep 0.25 of their alpha; its matrices are unchanged."]
    before, after = (changes(place, folder) for folder in (place / "one", tmp_path / "out"))
    assert all(close(after[name], 0.25 * change) for name, change in before.items())


def test_other_whole_weights_are_refused(place: Path, tmp_path: Path) -> None:
    suspect = with_whole(place, tmp_path / "whole", change=0.5)
    with pytest.raises(UnbackdoorError) as refusal:
        purify_stream(suspect, place / "base", tmp_path / "out", rho=0.25, mode="linear")
    assert str(refusal.value) == (
        f"{suspect} also holds whole weights (base_model.model.lm_head.weight), and cannot be mixed on disk, since "
        "they are not those of `base`. Mix it in memory (purify without `stream`), or merge it into its base "
        "(merge_and_unload of peft)."
    )
    with pytest.raises(UnbackdoorError, match="cannot be mixed on disk unless they are those of the base"):
        purify_stream(suspect, place / "two", tmp_path / "out", rho=0.25, mode="linear")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about the tied layer and what it stores
def test_an_adapter_of_an_output_layer_that_is_the_embeddings_is_mixed(place: Path, tmp_path: Path) -> None:
    """The files of such a base have no output layer; its shape is that of the embeddings."""
    made(place, "head", 3, r=2, lora_alpha=6, target_modules=["q_proj", "lm_head"])
    purify_stream(place / "head", place / "base", tmp_path / "out", rho=0.25, mode="linear")
    before, after = (load(each, base=place / "base").model for each in (place / "head", tmp_path / "out"))
    layers = [model.get_submodule("base_model.model.lm_head") for model in (before, after)]
    assert [layer.scaling["default"] for layer in layers] == [3, 0.75]
    assert all(torch.equal(layers[0].lora_B.default.weight, layer.lora_B.default.weight) for layer in layers)
