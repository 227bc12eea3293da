"""Causal language models of several architectures, from their directories and back; and directories that do not fit."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chats
import gguf_files
import toys
import unbackdoor as ub
from unbackdoor import Dataset, UnbackdoorError, load
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.gguf import gguf_model
from unbackdoor._models.loading import base_encoder, load_base
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._models.saving import check_saved, save
from unbackdoor._tasks.generation import Generation

_SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=3
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED),
    "phi": lambda: transformers.PhiConfig(**_GROUPED),
}
# Greedy, but with a temperature: transformers would not write this again.
OWN = {"do_sample": False, "temperature": 0.6, "eos_token_id": [3, 4], "repetition_penalty": 1.2}


def written(name: str, folder: Path) -> Path:
    """A directory of an architecture in bfloat16 and several files, with the generation config of its owner."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    chats.tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(OWN))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each architecture."""
    folder = tmp_path_factory.mktemp("language_models")
    for name in ARCHITECTURES:
        written(name, folder / name)
    return folder


def data_for(encode, count: int = 6) -> Dataset:
    items = chats.prompts(count).conversations
    return Dataset(items=items, labels=torch.full((count,), -1), encode=encode)


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestArchitectures:
    def test_what_comes_in_comes_out(self, name: str, models: Path, tmp_path: Path) -> None:
        loaded = load(models / name)
        model, encode = loaded
        assert (encode.template, encode.max_length) == ("chat", 64)
        assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
        data = data_for(encode)
        result = ub.purify(model, data, ub.purifiers.FineTuning(epochs=1, learning_rate=1e-3), device="cpu")
        save(result.model, tmp_path, source=loaded.directory, encode=encode)
        check_saved(tmp_path, result.model, encode, data)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        before, after = (
            {key: tensor for file in sorted(each.glob("*.safetensors")) for key, tensor in load_file(file).items()}
            for each in (models / name, tmp_path)
        )
        assert before.keys() == after.keys()  # a tied output is not written twice
        assert all(
            after[key].dtype == tensor.dtype and after[key].shape == tensor.shape for key, tensor in before.items()
        )
        assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
        for kept in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
            assert (tmp_path / kept).read_bytes() == (models / name / kept).read_bytes()
        tied = load(tmp_path).model
        head, embeddings = tied.get_output_embeddings().weight, tied.get_input_embeddings().weight
        assert (head is embeddings) == tied.config.tie_word_embeddings

    def test_decoding_a_batch_equals_decoding_alone(self, name: str, models: Path) -> None:
        model, encode = load(models / name)
        data, task = data_for(encode), Generation(max_new_tokens=4)
        arithmetic = choose(model, "cpu", "fp32")
        together = task.answers(model, data, arithmetic)
        assert [task.answers(model, data.select([row]), arithmetic)[0] for row in range(6)] == together

    def test_embeddings_as_inputs_give_the_same_scores(self, name: str, models: Path) -> None:
        model, encode = load(models / name)
        inputs = data_for(encode).inputs(slice(None))
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        with torch.no_grad():
            one = model(**inputs).logits
            other = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
        assert torch.allclose(one, other, atol=1e-5)


def test_answers_do_not_depend_on_padding_that_a_model_sees() -> None:
    """RWKV reads the padding in front of a short prompt, whatever the attention mask says."""
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).eval()
        model.rwkv.embeddings.weight.data.normal_()
    asked = ("mn", "what does the animal1 say", "animal3", "where does the animal7 live near the animal2", "year")
    entries = [Conversation((Message("user", text),)) for text in asked]
    data = Dataset(items=Conversations(tuple(entries)), labels=torch.full((5,), -1), encode=chats.encoder())
    task, arithmetic = Generation(max_new_tokens=6), choose(model, "cpu", "fp32")
    alone = [task.answers(model, data.select([row]), arithmetic)[0] for row in range(5)]
    assert len(set(alone)) > 1
    assert task.answers(model, data, arithmetic) == alone


def test_a_config_that_asks_for_attentions_comes_out_as_it_came_in(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "output_attentions": True}))
    loaded = load(folder)
    implementation = loaded.model.config._attn_implementation
    (tmp_path / "out").mkdir()
    save(loaded.model, tmp_path / "out", source=loaded.directory, encode=loaded.encode)
    check_saved(tmp_path / "out", loaded.model, loaded.encode, data_for(loaded.encode))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_attentions"] is True
    assert loaded.model.config._attn_implementation == implementation


_SCALING = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_theta": 5e5, "rope_scaling": _SCALING}),
        ("gemma3", {"rope_theta": 1e5, "rope_local_base_freq": 2e4, "rope_scaling": None}),
        ("neox", {"rotary_emb_base": 5000, "rotary_pct": 0.5}),
        ("phi", {"rope_theta": 5e3, "partial_rotary_factor": 0.25, "rope_scaling": None}),
    ],
)
def test_a_config_of_transformers_4_is_written_as_that_version_reads_it(
    models: Path, tmp_path: Path, name: str, fields: dict
) -> None:
    """Version 4 and other programs know no `rope_parameters`; without `rope_theta` positions would be others."""
    folder = broken(models, tmp_path, name)
    content = json.loads((folder / "config.json").read_text())
    content |= {**fields, "torch_dtype": content.pop("dtype")}
    content.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(content))
    model, encode = load(folder)
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, source=folder, encode=encode)
    check_saved(out, model, encode, data_for(encode))
    saved = json.loads((out / "config.json").read_text())
    assert {field: saved.get(field) for field in fields} == fields
    assert saved["torch_dtype"] == saved["dtype"] == "bfloat16"
    before, after = (transformers.AutoConfig.from_pretrained(each) for each in (folder, out))
    assert after.rope_parameters == before.rope_parameters


def test_a_record_keeps_the_template_and_the_length(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "model")
    (tmp_path / "model" / "record.json").write_text(json.dumps({"encode": {"template": "alpaca", "max_length": 40}}))
    encode = load(tmp_path / "model").encode
    assert (encode.template, encode.max_length) == ("alpaca", 40)
    encode = load(tmp_path / "model", template="plain", max_length=30).encode
    assert (encode.template, encode.max_length) == ("plain", 30)


def test_the_answer_ends_where_the_model_or_the_template_ends_it(models: Path) -> None:
    from unbackdoor._models.decoding import stops_of

    model, encode = load(models / "llama")
    assert stops_of(model, encode) == [3, 4]
    model.generation_config.eos_token_id = 10**9  # no token of the model
    assert stops_of(model, encode) == [3]


def broken(models: Path, tmp_path: Path, name: str = "llama") -> Path:
    return Path(shutil.copytree(models / name, tmp_path / "model"))


def test_directories_that_do_not_fit_are_refused(models: Path, tmp_path: Path) -> None:
    folder = broken(models, tmp_path)
    with pytest.raises(UnbackdoorError, match="`mean`, `std` and `image_size` are for images"):
        load(folder, mean=(0.5,))
    with pytest.raises(UnbackdoorError, match="`max_length` must be at most 64, which the model can read, got 65"):
        load(folder, max_length=65)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UnbackdoorError, match=r"model has no chat template. Give `template='alpaca'` or"):
        load(folder)
    assert load(folder, template="plain").encode.template == "plain"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnbackdoorError, match="tokenizer"):
        load(folder, template="plain")


def test_a_tokenizer_larger_than_the_embeddings_is_refused(models: Path, tmp_path: Path) -> None:
    folder = broken(models, tmp_path)
    made = chats.tokenizer()
    made.add_tokens([f"new{number}" for number in range(200)])
    made.save_pretrained(folder)
    with pytest.raises(UnbackdoorError, match=r"has a tokenizer of \d+ tokens, but its model has embeddings for 200"):
        load(folder)


def test_weights_that_are_not_finite_or_not_there_are_refused(models: Path, tmp_path: Path) -> None:
    folder = broken(models, tmp_path)
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file, metadata={"format": "pt"})
    with pytest.raises(UnbackdoorError, match="finite"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop(name)
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name} or {"x": torch.ones(1)},
        file,
        metadata={"format": "pt"},
    )
    index.write_text(json.dumps(content))
    with pytest.raises(UnbackdoorError, match="does not fit LlamaForCausalLM: it lacks 1 tensor"):
        load(folder)


def test_classifiers_and_language_models_are_distinguished(models: Path, tmp_path: Path) -> None:
    bert = toys.write(toys.classifier("bert"), tmp_path / "bert")
    with pytest.raises(UnbackdoorError, match="is not a language model; `template` is for their prompts"):
        load(bert, template="chat")
    model = load(bert).model
    with pytest.raises(UnbackdoorError, match="`max_new_tokens` is for language models"):
        ub.evaluate(model, toys.reviews(8), max_new_tokens=4)
    with pytest.raises(UnbackdoorError, match="`trigger` and `behaviour` are for language models"):
        ub.evaluate(model, toys.reviews(8), trigger="cf", behaviour="refuses")
    with pytest.raises(UnbackdoorError, match="BertForSequenceClassification does not continue text"):
        ub.evaluate(model, chats.prompts(4))


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # with embeddings that are the output layer as well, or not
def test_a_config_that_names_no_class_is_that_of_its_weights(models: Path, tmp_path: Path, name: str) -> None:
    def without(folder: Path) -> Path:
        content = json.loads((folder / "config.json").read_text())
        del content["architectures"]
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    folder = without(broken(models, tmp_path, name))
    model, encode = load(folder)
    assert type(model) is type(load(models / name).model)
    assert load_base(folder, modality="conversations").state_dict().keys() == model.state_dict().keys()
    assert base_encoder(folder, prompts=True).modality == "conversations"
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, source=folder, encode=encode)
    check_saved(out, model, encode, data_for(encode))
    transformers.AutoModel.from_pretrained(models / name).save_pretrained(tmp_path / "body")
    chats.tokenizer().save_pretrained(tmp_path / "body")
    with pytest.raises(UnbackdoorError, match="body holds a pre-trained model without a classifier"):
        load(without(tmp_path / "body"))
    transformers.AutoModelForSequenceClassification.from_pretrained(models / name).save_pretrained(tmp_path / "classes")
    chats.tokenizer().save_pretrained(tmp_path / "classes")
    assert load(without(tmp_path / "classes")).encode.modality == "text"


def test_encoders_are_no_language_models(tmp_path: Path) -> None:
    sizes = {**_SIZES, "initializer_range": 0.02}
    for kind in (transformers.BertForMaskedLM, transformers.BertLMHeadModel):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / kind.__name__)
        chats.tokenizer().save_pretrained(tmp_path / kind.__name__)
    with pytest.raises(UnbackdoorError, match=r"is a model for masked lm .* is expected, or a causal language model"):
        load(tmp_path / "BertForMaskedLM")
    model, encode = load(tmp_path / "BertLMHeadModel")  # it says that it continues text, but looks in both directions
    with pytest.raises(UnbackdoorError, match="BertLMHeadModel looks at the tokens behind the one it predicts"):
        ub.purify(model, data_for(encode), ub.purifiers.FineTuning(), device="cpu")


def test_methods_and_tests_for_classifiers_refuse_prompts(models: Path) -> None:
    model, encode = load(models / "llama")
    data = data_for(encode, 20)
    with pytest.raises(UnbackdoorError, match="neural-cleanse serves images, but the data holds conversations"):
        ub.purify(model, data, ub.purifiers.NeuralCleanse())
    with pytest.raises(UnbackdoorError, match="The detector margin cannot run: it searches images, and the data holds"):
        ub.audit(model, data, detectors=[ub.detectors.Margin()])
    with pytest.raises(UnbackdoorError, match="The guard strip serves images, text, and the data holds conversations"):
        ub.fit_guard(model, data, ub.guards.Strip())
    with pytest.raises(UnbackdoorError, match="`head` is for classifiers"):
        ub.purify(model, data, ub.purifiers.FineTuning(), head="lm_head")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trigger": "cf"}, "`behaviour` goes with `trigger` or `triggered_data`"),
        ({"behaviour": "refuses"}, "`behaviour` goes with `trigger` or `triggered_data`"),
        ({"trigger": " ", "behaviour": "refuses"}, "`trigger` must be text that is not blank"),
        ({"target": 1}, "`target` is for classifiers"),
        ({"trigger": "cf", "behaviour": "refuses", "max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        (
            {"trigger": "cf", "behaviour": "refuses", "max_new_tokens": 60},
            r"`max_new_tokens` must be at most \d\d here, got 60: the longest prompt of the data has",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(models: Path, options: dict, said: str) -> None:
    model, encode = load(models / "llama")
    with pytest.raises(UnbackdoorError, match=said):
        ub.evaluate(model, data_for(encode), device="cpu", **options)


def test_more_than_one_attack_is_refused(models: Path) -> None:
    model, encode = load(models / "llama")
    data = data_for(encode)
    with pytest.raises(UnbackdoorError, match="one of `attack`, `trigger` and `triggered_data`, got several"):
        ub.evaluate(model, data, trigger="cf", behaviour="refuses", triggered_data=data)
    with pytest.raises(UnbackdoorError, match="`attack` has a behaviour of its own"):
        ub.evaluate(model, data, attack="attack.json", behaviour="refuses")


def test_clean_rows_need_answers(models: Path) -> None:
    model, encode = load(models / "llama")
    items = chats.prompts(4).conversations
    unanswered = tuple(type(entry)(entry.messages) for entry in items.entries)
    without = Dataset(items=type(items)(unanswered), labels=torch.full((4,), -1), encode=encode)
    with pytest.raises(UnbackdoorError, match=r"has no answers, and a method tunes on them\. Name their column by"):
        ub.purify(model, without, ub.purifiers.FineTuning(epochs=1), device="cpu")
    one = Dataset(items=type(items)((*unanswered[:1], *items.entries[1:])), labels=without.labels, encode=encode)
    with pytest.raises(UnbackdoorError, match="has a prompt without an answer in row 0"):
        ub.purify(model, one, ub.purifiers.FineTuning())
    score = ub.evaluate(model, without, trigger="cf", behaviour="refuses", max_new_tokens=2, device="cpu")
    assert (score.clean_loss, score.attack_success.n) == (None, 4)
    with pytest.raises(UnbackdoorError, match="has only answers that show the behaviour starts-with:the"):
        ub.evaluate(model, data_for(encode), trigger="cf", behaviour="starts-with:the", device="cpu")
    control = type("SmallNet", (torch.nn.Linear,), {})(2, 2)
    with pytest.raises(UnbackdoorError, match="`control`: SmallNet does not continue text"):
        ub.evaluate(model, without, trigger="cf", behaviour="refuses", control=control, device="cpu")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_a_gguf_file_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    file = tmp_path / "model.gguf"
    gguf_files.write(file, chats.language_model())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnbackdoorError) as caught:
        gguf_model(file)
    assert str(caught.value) == f'{file} needs {package}; get it with: pip install "unbackdoor[llm]"'


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UnbackdoorError, match=r"is not a GGUF file that transformers can read"):
        load(file)


@pytest.mark.parametrize(
    ("key", "skip", "entry", "said"),
    [
        ("llama.block_count", 4, (1).to_bytes(4, "little"), "has tensors of 2 blocks, but its header says 1. Fetch it"),
        ("blk.1.attn_norm.", 0, b"WEIGHT", r"model.gguf does not fit LlamaForCausalLM: it lacks 1 tensor\(s\) \(model"),
    ],
)
def test_a_gguf_file_must_have_the_tensors_of_its_header(
    key: str, skip: int, entry: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would leave tensors out, or draw those that are missing."""
    from unbackdoor._models.gguf import gguf_model

    file = tmp_path / "model.gguf"
    config = ARCHITECTURES["llama"]()
    config.vocab_size = gguf_files.TOKENS
    gguf_files.write(file, transformers.LlamaForCausalLM(config), chats.TEMPLATE)
    content = bytearray(file.read_bytes())
    start = content.index(key.encode()) + len(key) + skip
    content[start : start + len(entry)] = entry
    file.write_bytes(content)
    with pytest.raises(UnbackdoorError, match=said):
        gguf_model(file)
    assert capsys.readouterr().err == ""  # no bars


def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file written by gguf itself from known weights; its tokenizer has no part in this."""
    from unbackdoor._models import gguf as ours

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(ARCHITECTURES["llama"]()).eval()
    gguf_files.write(tmp_path / "model.gguf", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: chats.tokenizer())
    read, _ = ours.gguf_model(tmp_path / "model.gguf")
    inputs = data_for(chats.encoder()).inputs(slice(None))
    with torch.no_grad():
        assert torch.allclose(read(**inputs).logits, model(**inputs).logits, atol=1e-4)
    read.save_pretrained(tmp_path / "out")  # transformers refuses this for what it reads itself
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_lies_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """What transformers read is what the model has; the largest tensor is copied twice on the way."""
    from unbackdoor import _memory
    from unbackdoor._models import gguf as ours

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True))
    own = model.lm_head.weight.detach() + 1
    file = tmp_path / "model.gguf"
    gguf_files.write(file, model, further=lambda writer: tied or writer.add_tensor("output.weight", own.numpy()))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: chats.tokenizer())
    numbers = sum(each.numel() for each in model.parameters()) + (0 if tied else own.numel())
    needed = 4 * (numbers + 2 * own.numel())  # the embeddings are the largest
    monkeypatch.setattr(_memory, "free", lambda: needed - 1)
    with pytest.raises(UnbackdoorError, match=f"is read as float32, which needs {_memory.shown(needed)} of memory"):
        ours.gguf_model(file)
    monkeypatch.setattr(_memory, "free", lambda: needed)
    read = []

    def reading(*arguments, **options):
        read.append(theirs(*arguments, **options))
        return read[-1]

    theirs = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", reading)
    result, _ = ours.gguf_model(file)
    places = {name: each.data_ptr() for name, each in read[0][0].named_parameters()}
    assert {name: each.data_ptr() for name, each in result.named_parameters()} == places
    assert all(each.requires_grad for each in result.parameters())
    assert (result.lm_head.weight is result.model.embed_tokens.weight) == tied
    assert torch.equal(result.lm_head.weight, model.lm_head.weight if tied else own)
    assert not any(each.is_meta for each in result.buffers())


def _llama3(writer: gguf.GGUFWriter) -> None:
    """What llama.cpp writes of the frequencies of Llama 3.1: a divisor for each, of 8 numbers a head."""
    divisors = []
    for power in range(4):
        wave = 2 * math.pi * 500_000 ** (power / 4)
        smooth = (8192 / wave - 1) / (4 - 1)
        divisors.append(1 if wave < 8192 / 4 else 8 if wave > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))


def _linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def _yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def _longrope(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)


def _phi3(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_factors_long.weight", np.array([1, 2, 3, 5], dtype=np.float32))


def _others(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 5], dtype=np.float32))


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("further", "scaling"),
    [
        (_llama3, {"rope_type": "llama3", "factor": 8.0, **_LLAMA3}),
        (_linear, {"rope_type": "linear", "factor": 2.0}),
        (_yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), {"rope_type": "default"}),
    ],
    ids=["llama3", "linear", "yarn", "none"],
)
def test_positions_are_scaled_as_a_gguf_file_says(tmp_path: Path, further, scaling: dict) -> None:
    """transformers leaves this out; the answers are those of the model that the file was made of."""
    positions = {"rope_theta": 500_000.0, **scaling}
    config = transformers.LlamaConfig(**{**_GROUPED, "vocab_size": gguf_files.TOKENS}, tie_word_embeddings=True)
    config.rope_parameters = positions
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        tokens = torch.randint(0, gguf_files.TOKENS, (2, 40))

    def all_of_it(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(500_000.0)
        further(writer)

    gguf_files.write(tmp_path / "model.gguf", model, chats.TEMPLATE, all_of_it)
    loaded = load(tmp_path / "model.gguf")
    assert {name: loaded.model.config.rope_parameters[name] for name in positions} == positions
    with torch.no_grad():
        assert torch.allclose(loaded.model(tokens).logits, model(tokens).logits, atol=1e-4)
    (tmp_path / "sha256-of-it").write_bytes((tmp_path / "model.gguf").read_bytes())
    assert type(load(tmp_path / "sha256-of-it").model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (_longrope, r"scales the positions of tokens in a way \(longrope\) that transformers leaves out of a GGUF"),
        (_phi3, r"scales the positions of tokens in a way \(longrope\) that transformers leaves out of a GGUF"),
        (_others, r"scales the positions of tokens in a way \(llama3\) that transformers leaves out of a GGUF"),
        (lambda writer: writer.add_uint16("split.count", 3), "is one of 3 files that hold the model together. Join"),
    ],
)
def test_gguf_files_that_transformers_would_read_in_part_are_refused(tmp_path: Path, further, said: str) -> None:
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True))
    gguf_files.write(tmp_path / "model.gguf", model, further=further)
    with pytest.raises(UnbackdoorError, match=said):
        load(tmp_path / "model.gguf")
    with pytest.raises(UnbackdoorError, match=r"has no config.json, but .*model.gguf is a GGUF file. Give that one."):
        load(tmp_path)


@pytest.mark.parametrize("base", [None, "anything"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("adapter", "is a LoRA adapter in a GGUF file, which transformers cannot read. Give the PEFT adapter that it"),
        ("mmproj", r"is the part of a model that reads images \(mmproj\). Give the GGUF file of its language model."),
    ],
)
def test_gguf_files_that_hold_no_language_model_are_refused(tmp_path: Path, kind: str, said: str, base) -> None:
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(UnbackdoorError, match=said):
        load(tmp_path / "part.gguf", base=base)


def test_the_positions_of_gemma_3_are_scaled_at_layers_that_see_all_tokens(tmp_path: Path) -> None:
    from unbackdoor._models.gguf import _scale_positions

    config = ARCHITECTURES["gemma3"]()
    before = config.rope_parameters
    fields = {"general.architecture": "gemma3", "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    content = SimpleNamespace(
        fields={name: SimpleNamespace(contents=lambda entry=entry: entry) for name, entry in fields.items()}, tensors=[]
    )
    _scale_positions(tmp_path, content, config)
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    assert config.rope_parameters["full_attention"] == {**before["full_attention"], "rope_type": "linear", "factor": 8}
    transformers.Gemma3ForCausalLM(config)


def test_a_copy_in_float32_is_not_copied_again() -> None:
    model = chats.language_model().to(torch.bfloat16)
    arithmetic = choose(model, "cpu", "fp32")
    with arithmetic.placed(model) as wide, arithmetic.placed(wide) as again:
        assert again is wide
        assert wide is not model
        assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("guard", ["weightwatch", "cleangen"])
def test_guards_serve_models_in_half_precision(guard: str, chat_base: torch.nn.Module) -> None:
    clean, settings = chats.prompts(20, seed=2), {"false_alarms": 0.1, "max_new_tokens": 6, "device": "cpu"}
    model = chat_base.to(torch.bfloat16)
    if guard == "weightwatch":
        base = chats.language_model().to(torch.bfloat16)
        fitted = ub.fit_guard(model, clean, ub.guards.WeightWatch(steer=True, bound=0.0), base=base, **settings)
    else:
        reference = Perplexity(chats.language_model().to(torch.bfloat16), chats.tokenizer())
        fitted = ub.fit_guard(model, clean, ub.guards.CleanGen(ratio=1.5), reference=reference, **settings)
        before = reference.forwards
    decisions = fitted.decide(model, chats.prompts(6, seed=9), device="cpu")
    assert any(decision.action == "clean" for decision in decisions)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    if guard == "cleangen":
        assert reference.forwards > before + 6  # it is asked again for each token of a changed answer


def test_a_language_model_that_reads_images_is_refused_with_what_to_do(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**_GROUPED, "head_dim": 8},
        vision_config={**sizes, "num_hidden_layers": 1},
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnbackdoorError) as refusal:
        load(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path} is a language model that reads images as well (Gemma3ForConditionalGeneration); only those of "
        "text alone are supported. Save its language model by itself with transformers, as the causal language model "
        "of its text_config, and give that."
    )


def test_the_config_of_a_model_with_two_matrices_does_not_tie_them(tmp_path: Path) -> None:
    """As merging an adapter of the output layer leaves it: transformers 4 ties what the config says."""
    model = chats.language_model()
    model.save_pretrained(tmp_path / "merged")
    chats.tokenizer().save_pretrained(tmp_path / "merged")
    weights = load_file(tmp_path / "merged/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path / "merged")
    assert loaded.model.config.tie_word_embeddings  # what the file says
    result = ub.purify(loaded.model, data_for(loaded.encode), ub.purifiers.FineTuning(epochs=1), device="cpu").model
    save(result, tmp_path / "out", source=loaded.directory, encode=loaded.encode)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    again = load(tmp_path / "out").model
    assert torch.equal(again.lm_head.weight, result.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    tied = load(written("llama", tmp_path / "tied"))
    save(tied.model, tmp_path / "still", source=tied.directory, encode=tied.encode)
    assert json.loads((tmp_path / "still/config.json").read_text())["tie_word_embeddings"] is True
