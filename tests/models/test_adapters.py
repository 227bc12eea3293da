"""PEFT LoRA adapters: trained by a plain script, purified, loaded again by peft; and adapters that are refused."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chats
import toys
from unbackdoor import UnbackdoorError, evaluate, load, purifiers, purify
from unbackdoor._cli.commands.inputs import load_model
from unbackdoor._cli.options import EvaluateOptions, PurifyOptions
from unbackdoor._detection.audit import _working
from unbackdoor._errors import IncompleteError
from unbackdoor._models.adapters import adapter_files
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.saving import check_saved, save
from unbackdoor._stress.stress import _own

# peft asks transformers in a way that it will not answer for ever; the library itself hides that from users.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TEMPLATE = chats.TEMPLATE.replace("message.content", "message.content | trim")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _chat_victim: torch.nn.Module) -> Path:
    """A base, and an adapter of it whose matrices are random."""
    folder = tmp_path_factory.mktemp("adapters")
    _chat_victim.save_pretrained(folder / "base")
    chats.tokenizer().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM", alpha_pattern={"down_proj": 2}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    adapted.save_pretrained(folder / "adapter")
    lines = [
        json.dumps({"prompt": entry.messages[0].content, "response": entry.answer})
        for entry in chats.conversations(24, 3)
    ]
    (folder / "clean.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def by_peft(place: Path, adapter: Path) -> torch.nn.Module:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**chats.prompts(4).inputs(slice(None))).logits


def test_an_adapter_answers_as_peft_itself_loads_it(place: Path) -> None:
    model, encode = load(place / "adapter", base=place / "base")
    assert encode.template == "chat"
    assert torch.allclose(scores(model), scores(by_peft(place, place / "adapter")), atol=1e-5)


def test_an_adapter_in_gives_an_adapter_out(place: Path, tmp_path: Path) -> None:
    model, encode = load(place / "adapter", base=place / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = purify(model, chats.prompts(16, seed=3), purifiers.FineTuning(epochs=1, learning_rate=1e-2), device="cpu")
    after = result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)  # the base is as it was
    save(result.model, tmp_path, source=place / "adapter", encode=encode)
    check_saved(tmp_path, result.model, encode, chats.prompts(4), base=place / "base")
    assert (tmp_path / "adapter_config.json").read_bytes() == (place / "adapter" / "adapter_config.json").read_bytes()
    stored, own = (load_file(each / "adapter_model.safetensors") for each in (tmp_path, place / "adapter"))
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in own.items()
    }
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.allclose(scores(by_peft(place, tmp_path)), scores(result.model), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "patterns",
    [
        {r"layers\.0\..*": 64, "q_proj": 3},
        {"(q|v)_proj": 24},
        {"q_proj": 3, r"layers\.[0-9]+\.self_attn\.q_proj": 50},  # the first one counts
        {"model.layers.1.mlp.down_proj": 40, "^down_proj": 5},
        {"proj": 50},  # only part of a name
    ],
)
def test_alphas_follow_their_patterns_as_in_peft(place: Path, tmp_path: Path, patterns: dict[str, int]) -> None:
    folder = changed(place, tmp_path, alpha_pattern=patterns)
    expected = by_peft(place, folder)
    assert torch.allclose(scores(load(folder, base=place / "base").model), scores(expected), atol=1e-5)
    scales = {name: expected.get_submodule(f"base_model.model.{name}") for name in adapter_files(folder).scales}
    assert adapter_files(folder).scales == {name: layer.scaling["default"] for name, layer in scales.items()}


def test_an_adapter_whose_script_named_no_task_is_one_of_a_language_model(place: Path, tmp_path: Path) -> None:
    folder = changed(place, tmp_path, task_type=None)
    model, encode = load(folder, base=place / "base")
    assert torch.equal(scores(model), scores(load(place / "adapter", base=place / "base").model))
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, source=folder, encode=encode)
    check_saved(out, model, encode, chats.prompts(4), base=place / "base")
    bert = toys.write(toys.classifier("bert"), tmp_path / "bert")
    with pytest.raises(UnbackdoorError, match=r"`base` must be a causal language model, since .* names no other task"):
        load(folder, base=bert)


def test_an_adapter_of_another_task_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    folder = changed(place, tmp_path, task_type="TOKEN_CLS")
    for options in ({}, {"base": place / "base"}):
        with pytest.raises(UnbackdoorError, match="is an adapter for the task TOKEN_CLS; only those for CAUSAL_LM"):
            load(folder, **options)
    with pytest.raises(UnbackdoorError, match="is an adapter for the task TOKEN_CLS"):
        adapter_files(folder)
    other = changed(place, tmp_path / "other", task_type=None, auto_mapping={"base_model_class": "ViTModel"})
    with pytest.raises(UnbackdoorError, match="is an adapter for a model of the class ViTModel; only those for"):
        load(other)


def test_whole_weights_are_not_mixed_on_disk(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError, match=r"also holds whole weights \(base_model.model.lm_head.weight\), and"):
        adapter_files(rewritten(place, tmp_path, _resized))


@pytest.mark.parametrize("name", ["checkpoint-20", "another-name"])
def test_adapters_within_a_folder_are_named(place: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(place / "adapter", tmp_path / "run" / name)
    with pytest.raises(UnbackdoorError, match=rf"run has no config.json, but (.* hold models.* )?.*run/{name}"):
        load(tmp_path / "run", base=place / "base")


def test_copies_of_the_weights_of_the_base_are_left_out(place: Path, tmp_path: Path) -> None:
    """peft stores the embeddings with an adapter that changes the output layer, or if it takes them for resized."""
    base = load(place / "base").model
    folder = rewritten(place, tmp_path, lambda tensors: tensors.update(_copies(base)))
    model, encode = load(folder, base=place / "base")
    assert torch.equal(scores(model), scores(load(place / "adapter", base=place / "base").model))
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, source=folder, encode=encode)
    assert (out / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    assert (
        load_file(out / "adapter_model.safetensors").keys()
        == load_file(place / "adapter/adapter_model.safetensors").keys()
    )
    assert torch.allclose(scores(by_peft(place, out)), scores(model), atol=1e-5)


def _copies(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    shared = base.get_input_embeddings().weight.detach()
    return {
        "base_model.model.lm_head.base_layer.weight": shared.bfloat16(),
        "base_model.model.model.embed_tokens.weight": shared.clone(),
    }


def test_answers_of_an_adapter_are_decoded(place: Path) -> None:
    model, _ = load(place / "adapter", base=place / "base")
    score = evaluate(model, chats.prompts(4), trigger="cf", behaviour="refuses", max_new_tokens=4, device="cpu")
    assert score.attack_success is not None
    assert score.attack_success.n == 4


def changed(place: Path, tmp_path: Path, **fields: object) -> Path:
    folder = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"peft_type": "IA3"},
            r"is an adapter of the kind IA3; only LoRA is supported. Merge it into its base \(merge_",
        ),
        (
            {"peft_type": "PREFIX_TUNING"},
            "of the kind PREFIX_TUNING; only LoRA is supported. It cannot be added to the",
        ),
        ({"peft_type": None}, r"adapter_config.json names no peft_type, so peft did not write it; adapters of mlx-lm,"),
        ({"modules_to_save": ["lm_head"]}, r"also replaces whole layers \(modules_to_save"),
        (
            {"bias": "all"},
            r"is an adapter that also changes biases \(all\), which matrices of low rank do not keep. Load",
        ),
        ({"bias": "some"}, "must have bias as none, all or lora_only, got some. Fetch it again"),
        (
            {"peft_type": "XLORA"},
            "is an adapter of the kind XLORA; only LoRA is supported. It cannot be added to the weights of its base",
        ),
        (
            {"alora_invocation_tokens": [7]},
            r"is an adapter that acts behind certain tokens alone \(alora_invocation_tokens\), so it cannot be added",
        ),
        ({"arrow_config": {"top_k": 2}}, r"chooses among other adapters for each token \(arrow_config\), so it cannot"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"that repeats layers of its base \(layer_replication\), so it can"),
        (
            {"use_dora": True},
            r"trains the lengths of weights \(use_dora\), which .* Load it with `merge`, which adds it",
        ),
        ({"trainable_token_indices": [1]}, "is not a plain LoRA adapter: its config sets trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "is not a plain LoRA adapter: its config sets init_lora_weights"),
        ({"a_new_thing": {"code": "x.py"}}, "is not a plain LoRA adapter: its config sets a_new_thing"),
        ({"lora_alpha": "many"}, "must have lora_alpha as a number, got many"),
        ({"alpha_pattern": {"q_proj": "many"}}, "must have lora_alpha as a number, got many"),
        ({"alpha_pattern": ["q_proj"]}, "must have alpha_pattern as numbers by pattern, got "),
        ({"alpha_pattern": {"(q_proj": 2}}, r"has the pattern \(q_proj in alpha_pattern, which must be a regular"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "must be a regular expression of at most 300 characters and 4 groups"),
    ],
)
def test_other_adapters_are_refused_by_name(place: Path, tmp_path: Path, fields: dict, said: str) -> None:
    with pytest.raises(UnbackdoorError, match=said):
        load(changed(place, tmp_path, **fields), base=place / "base")


def rewritten(place: Path, tmp_path: Path, change) -> Path:
    folder = changed(place, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _nan(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan"))


def _short(tensors: dict) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :8].contiguous()


def _elsewhere(tensors: dict) -> None:
    name = next(name for name in tensors if "layers.0" in name)
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def _truth(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name] > 0


def _resized(tensors: dict) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(201, 64)


def _elsewhere_whole(tensors: dict) -> None:
    tensors["base_model.model.mlp.weight"] = torch.ones(2, 2)


def _spread(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.empty(0)


def _compiled(tensors: dict) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def _as_in_a_model(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)


def _of_an_embedding(tensors: dict) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 200)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_nan, "finite"),
        (_truth, "must have real numbers in its tensors, got torch.bool in base_model.model.model.layers.0"),
        (_short, "does not fit `base`: model.layers.0"),
        (_elsewhere, "does not fit `base`: it changes model.layers.[07]"),
        (_resized, r"also holds the whole base_model.model.lm_head.weight, which is not that of `base`"),
        (_elsewhere_whole, r"also holds the whole base_model.model.mlp.weight, which is not that of `base`"),
        (
            _of_an_embedding,
            r"has the tensor base_model.model.model.embed_tokens.lora_embedding_A, which belongs to no linear .* "
            r"its embeddings \(tie_word_embeddings\), give it a copy of its own first: peft would change both\.$",
        ),
        (dict.clear, "has an adapter without a tensor"),
        (_spread, "without a number in it, as scripts leave it that save a part of a model which several processes"),
        (_compiled, "has the tensor _orig_mod.base_model.*, which peft would leave out: it reads the names base_model"),
        (
            _as_in_a_model,
            "lora_A.default.weight, which peft would leave out: it reads the names base_model.model.LAYER",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(place: Path, tmp_path: Path, change, said: str) -> None:
    with pytest.raises(UnbackdoorError, match=said):
        load(rewritten(place, tmp_path, change), base=place / "base")


def test_a_merged_adapter_is_a_whole_model_with_the_same_answers(place: Path, tmp_path: Path) -> None:
    """In the files of its base, and with the tokenizer of the adapter."""
    folder = changed(place, tmp_path)
    chats.tokenizer(TEMPLATE).save_pretrained(folder)
    model, encode = loaded = load(folder, base=place / "base", merge=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert torch.allclose(scores(model), scores(by_peft(place, place / "adapter")), atol=1e-5)
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, source=loaded.directory, encode=encode)
    check_saved(out, model, encode, chats.prompts(4))
    assert not (out / "adapter_config.json").exists()
    assert load(out).encode.tokenizer.chat_template == TEMPLATE


def trained_by_peft(place: Path, folder: Path, base: str = "base", **settings: object) -> Path:
    """An adapter whose every trained number differs from where it began."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def biased(place: Path) -> Path:
    """A base of another kind whose layers have biases, GPT-2."""
    chats.short_reader().save_pretrained(place / "biased")
    chats.tokenizer().save_pretrained(place / "biased")
    return place


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("base", ["base", pytest.param("biased", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only", "use_dora": True, "use_rslora": True}]
)
def test_more_than_an_adapter_of_low_rank_is_merged_as_peft_merges_it(
    biased: Path, tmp_path: Path, base: str, settings: dict
) -> None:
    adapter = trained_by_peft(biased, tmp_path / "adapter", base, target_modules="all-linear", r=4, **settings)
    below = transformers.AutoModelForCausalLM.from_pretrained(biased / base)
    wanted = peft.PeftModel.from_pretrained(below, adapter).merge_and_unload().eval()
    assert not torch.allclose(scores(wanted), scores(load(biased / base).model), atol=0.01)
    loaded = load(adapter, base=biased / base, merge=True)
    assert torch.equal(scores(loaded.model), scores(wanted))
    out = tmp_path / "out"
    save(loaded.model, out, source=loaded.directory, encode=loaded.encode)
    assert torch.equal(scores(transformers.AutoModelForCausalLM.from_pretrained(out)), scores(wanted))


def test_commands_that_write_no_adapter_merge_such_a_one_by_themselves(place: Path, tmp_path: Path) -> None:
    adapter = trained_by_peft(place, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    options = EvaluateOptions(base=str(place / "base"), data="rows.jsonl")
    model, _ = load_model(str(adapter), options)
    assert torch.equal(scores(model), scores(load(adapter, base=place / "base", merge=True).model))
    with pytest.raises(UnbackdoorError, match=r"trains the lengths of weights \(use_dora\).* with `merge`"):
        load_model(str(adapter), PurifyOptions(base=str(place / "base"), out="out"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_lengths_and_biases_that_are_not_those_of_the_base_are_refused(biased: Path, tmp_path: Path) -> None:
    adapter = trained_by_peft(
        biased, tmp_path / "a", "biased", target_modules=["c_fc"], use_dora=True, bias="lora_only"
    )
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    length = "base_model.model.transformer.h.0.mlp.c_fc.lora_magnitude_vector"
    for changed, said in (
        (
            {**tensors, length: tensors[length][:8].clone()},
            r"but those of .*h.0.mlp.c_fc.lora_magnitude_vector are mis",
        ),
        ({name: each for name, each in tensors.items() if name != length}, r"but those of .*h.0.mlp.c_fc.lora_magn"),
        (
            {**tensors, "base_model.model.lm_head.bias": torch.ones(200)},
            r"has no bias .*lm_head.bias of the shape \(200",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(UnbackdoorError, match=said):
            load(adapter, base=biased / "biased", merge=True)


@pytest.mark.parametrize("beginning", ["eva", "orthogonal", "mica"])
def test_beginnings_that_leave_the_base_as_it_is_are_read_as_by_peft(
    place: Path, tmp_path: Path, beginning: str
) -> None:
    fields = {"eva_config": {"rho": 2.0, "tau": 0.99}} if beginning == "eva" else {}
    folder = changed(place, tmp_path, init_lora_weights=beginning, **fields)
    model, _ = load(folder, base=place / "base")
    assert torch.equal(scores(model), scores(by_peft(place, folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_counts_as_peft_counts_it(place: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """peft widens the matrices of an adapter, so that neither its answers nor a merged model are rounded by them."""

    def half(tensors: dict) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    folder = rewritten(place, tmp_path, half)
    by_them, data = by_peft(place, folder), chats.prompts(4)
    model, _ = load(folder, base=place / "base")
    with choose(model, "cpu", "fp32").placed(model) as placed:
        assert torch.equal(scores(placed), scores(by_them))
    score = evaluate(model, data, device="cpu", precision="fp32").clean_loss
    assert score is not None
    assert score.value == pytest.approx(evaluate(by_them, data, device="cpu", precision="fp32").clean_loss.value)
    merged = load(folder, base=place / "base", merge=True).model.state_dict()
    theirs = by_them.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in merged.items())


def test_an_adapter_that_changes_nothing_is_said(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def zero(tensors: dict) -> None:
        tensors.update({name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "lora_B" in name})

    load(rewritten(place, tmp_path, zero), base=place / "base")
    assert "adapter changes nothing: one of the two matrices is zero at every layer" in caplog.text


@pytest.fixture
def of_the_output(place: Path, tmp_path: Path) -> Path:
    """An adapter of the output layer, whose weights are also the embedding of the base."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    with pytest.warns(UserWarning, match="tied layer"):
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(adapted.get_parameter("base_model.model.lm_head.lora_B.default.weight"), std=0.5)
    adapted.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    return tmp_path / "head"


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning")  # of peft, for the comparison
def test_merging_does_not_change_a_tied_embedding(place: Path, tmp_path: Path, of_the_output: Path) -> None:
    loaded = load(of_the_output, base=place / "base", merge=True)
    wanted = scores(by_peft(place, of_the_output))
    assert not torch.allclose(wanted, scores(load(place / "base").model), atol=0.1)
    assert torch.allclose(scores(loaded.model), wanted, atol=1e-4)
    save(loaded.model, tmp_path / "whole", source=loaded.directory, encode=loaded.encode)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(scores(again), wanted, atol=1e-4)
    own = load(of_the_output, base=place / "base").model
    assert torch.allclose(scores(_working(own, None)), wanted, atol=1e-4)  # that an audit searches
    assert torch.allclose(scores(_own(own)), wanted, atol=1e-4)  # that a stress test starts from
    with pytest.raises(UnbackdoorError, match="is not an adapter; `merge` is for these"):
        load(place / "base", merge=True)


def test_a_base_of_another_name_or_a_larger_tokenizer_is_reported(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path(shutil.copytree(place / "base", tmp_path / "other"))
    load(place / "adapter", base=other)
    assert f"its config names {place / 'base'} as its base, not {other}" in caplog.text
    folder = changed(place, tmp_path)
    made = chats.tokenizer()
    made.add_tokens([f"new{number}" for number in range(200)])
    made.save_pretrained(folder)
    with pytest.raises(UnbackdoorError, match=r"adapter has a tokenizer of \d+ tokens, but its model has embeddings"):
        load(folder, base=place / "base")


def test_an_adapter_without_a_tokenizer_keeps_its_template(place: Path, tmp_path: Path) -> None:
    folder = changed(place, tmp_path)
    (folder / "record.json").write_text(json.dumps({"encode": {"template": "alpaca", "max_length": 40}}))
    encode = load(folder, base=place / "base").encode
    assert (encode.template, encode.max_length) == ("alpaca", 40)


def test_a_pickled_adapter_or_a_wrong_base_is_refused(place: Path, tmp_path: Path) -> None:
    folder = changed(place, tmp_path)
    with pytest.raises(UnbackdoorError, match=r"is an adapter, and its config names .* Give `base`"):
        load(folder)
    bert = toys.write(toys.classifier("bert"), tmp_path / "bert")
    with pytest.raises(UnbackdoorError, match=r"`base` must be a causal language model, since .* is an adapter of one"):
        load(folder, base=bert)
    with pytest.raises(UnbackdoorError, match="is not an adapter; `base` is for these"):
        load(place / "base", base=place / "base")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnbackdoorError, match=r"adapter_model.bin is a pickle, which is not opened"):
        load(folder, base=place / "base")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UnbackdoorError, match=r"it is missing. Save the adapter again with save_pretrained of peft"):
        load(folder, base=place / "base")


def test_the_command_that_converts_a_pickled_adapter_works(place: Path, tmp_path: Path) -> None:
    folder = changed(place, tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(UnbackdoorError) as refusal:
        load(folder, base=place / "base")
    command = str(refusal.value).partition("Convert it, in that folder: ")[2]
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    subprocess.run([sys.executable, option, code], cwd=folder, check=True)
    load(folder, base=place / "base")
    converted = load_file(file)
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


def test_a_tokenizer_of_an_adapter_that_a_merged_model_would_not_have_is_said(tmp_path: Path) -> None:
    """Next to the config of a Qwen2, transformers takes any tokenizer for a Qwen2Tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(vocab_size=200, **sizes, num_key_value_heads=1, max_position_embeddings=64)
    for folder in ("base", "adapter"):
        chats.tokenizer().save_pretrained(tmp_path / folder)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(transformers.Qwen2ForCausalLM(config), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path / "base")).__name__ == "Qwen2Tokenizer"

    def purified(name: str, *, merge: bool) -> None:
        loaded = load(tmp_path / "adapter", base=tmp_path / "base", merge=merge)
        source = loaded.directory.path if loaded.directory else tmp_path / "adapter"
        data = dataclasses.replace(chats.prompts(4), encode=loaded.encode)
        save(loaded.model, tmp_path / name, source=source, encode=loaded.encode)
        check_saved(tmp_path / name, loaded.model, loaded.encode, data, base=None if merge else tmp_path / "base")

    with pytest.raises(IncompleteError) as refusal:
        purified("merged", merge=True)
    assert str(refusal.value) == (
        f"{tmp_path}/adapter has a tokenizer of its own, a TokenizersBackend, which transformers would read as a "
        "Qwen2Tokenizer next to the config of a Qwen2ForCausalLM: the result would get other tokens, so nothing was "
        "kept. Purify the adapter without `merge`; or, if it was trained with the tokenizer of its base, remove the "
        "files of its own."
    )
    purified("adapted", merge=False)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "adapter" / file).unlink()
    purified("of-the-base", merge=True)


def test_what_trainers_leave_next_to_an_adapter_does_not_matter(place: Path, tmp_path: Path) -> None:
    """Checkpoints, the state of optimizers and pickled arguments are neither read nor copied."""
    folder = tmp_path / "adapter"
    shutil.copytree(place / "adapter", folder)
    shutil.copytree(place / "adapter", folder / "checkpoint-5")
    left = ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json", "all_results.json", "README.md")
    for file in (*left, "checkpoint-5/optimizer.pt"):
        (folder / file).write_bytes(b"cposix\nabort\n(tR.")
    loaded = load(folder, base=place / "base")
    assert torch.equal(scores(loaded.model), scores(load(place / "adapter", base=place / "base").model))
    save(loaded.model, tmp_path / "out", source=folder, encode=loaded.encode)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    assert not written & {*left, "checkpoint-5"}
