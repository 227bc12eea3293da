"""Language models that do not fit into memory: scored in parts, and refused before they are loaded everywhere else."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers

import chats
import unbackdoor
from unbackdoor import Dataset, UnbackdoorError, _memory, load, purifiers
from unbackdoor._cli.app import main
from unbackdoor._memory import shown
from unbackdoor._models import offloading
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import device_of
from unbackdoor._models.decoding import answers


def limit(monkeypatch: pytest.MonkeyPatch, left: int | None) -> None:
    """Let the machine have so many bytes left."""
    for module in (_memory, offloading):
        monkeypatch.setattr(module, "free", lambda: left)


def saved(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = True) -> int:
    """Writes a model of four blocks in shards; returns the bytes of its weights."""
    config = chats.language_model(layers=4).config
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder, max_shard_size="150KB")
    chats.tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rows(file: Path, count: int = 6) -> Path:
    lines = [{"prompt": each.messages[-1].text, "response": each.answer} for each in chats.conversations(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("tied", "share"), [(True, 0.7), (False, 0.01), pytest.param(True, 0.3, marks=pytest.mark.thorough)]
)
def test_a_model_that_lies_in_part_on_disk_has_the_score_of_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tied: bool, share: float
) -> None:
    size = saved(tmp_path / "model", tied=tied)
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    whole, encode = load(tmp_path / "model")
    test = Dataset.load(rows(tmp_path / "rows.jsonl"), encode)
    settings = {"trigger": "cf", "behaviour": "contains:love", "max_new_tokens": 4, "device": "cpu"}
    limit(monkeypatch, int(share * size))
    with caplog.at_level(logging.INFO, "unbackdoor"):
        parts, encode = load(tmp_path / "model", offload="cpu")
    (line,) = (each.getMessage() for each in caplog.records if "too large" in each.getMessage())
    assert " on disk, from where every pass reads them" in line
    assert any(each.is_meta for each in parts.parameters())
    assert device_of(parts) == torch.device("cpu")
    limit(monkeypatch, None)
    expected = unbackdoor.evaluate(whole, test, precision="fp32", **settings)
    assert unbackdoor.evaluate(parts, test, precision="fp32", **settings).to_json() == expected.to_json()
    said = [answers(model, test, choose(model, "cpu", "fp32"), 4) for model in (whole, parts)]
    assert said[0] == said[1]
    assert any(said[0])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


def test_half_precision_is_not_widened_where_the_copy_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = saved(tmp_path / "model", torch.bfloat16)
    limit(monkeypatch, 2 * size)  # the model alone fits
    parts, encode = load(tmp_path / "model", offload="auto")
    assert not any(each.is_meta for each in parts.parameters())
    test = Dataset.load(rows(tmp_path / "rows.jsonl"), encode)
    types = set()
    parts.lm_head.register_forward_hook(lambda _module, _args, output: types.add(output.dtype))
    score = unbackdoor.evaluate(parts, test, device="cpu")
    assert types == {torch.bfloat16}
    limit(monkeypatch, 4 * size)  # and so does the copy
    fits, _ = load(tmp_path / "model", offload="auto")
    expected = unbackdoor.evaluate(fits, test, device="cpu", precision="fp32").clean_loss.value
    assert score.clean_loss.value == pytest.approx(expected, rel=0.02)


def test_the_command_scores_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = saved(tmp_path / "model")
    limit(monkeypatch, int(0.7 * size))
    command = ["evaluate", str(tmp_path / "model"), "--data", str(rows(tmp_path / "rows.jsonl")), "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["clean_loss"]["n"] == 6
    assert "is too large to be scored as usual: of its weights, " in printed.err
    assert "meta device" not in printed.err


def test_what_needs_the_whole_model_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = saved(tmp_path / "model")
    limit(monkeypatch, size // 2)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    data, out = str(rows(tmp_path / "rows.jsonl")), str(tmp_path / "out")
    model = str(tmp_path / "model")
    for command in (
        ["purify", "fine-tuning", model, "--clean", data, "--out", out],
        ["audit", model, "--clean", data],
        ["attack", "word", "--base", model, "--data", data, "--out", out],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"{model} needs {shown(size)} of memory, and {shown(size // 2)} are free. "), command
    assert said.endswith(
        "Take a machine with more, or a smaller model. A whole model that is larger than memory can be scored "
        "(evaluate, or unbackdoor.load(PATH, offload='auto')), and models and adapters can be mixed on disk "
        "(unbackdoor purify fine-mixing --stream)."
    )
    assert not (tmp_path / "out").exists()


def test_a_copy_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chats.language_model().to(torch.bfloat16)
    count = sum(each.numel() for each in model.parameters())
    limit(monkeypatch, 3 * count)
    with pytest.raises(UnbackdoorError) as refusal:
        unbackdoor.purify(model, chats.prompts(20), purifiers.FineTuning(), device="cpu")
    assert str(refusal.value).startswith(
        f"LlamaForCausalLM is worked on as a copy in float32, which needs {shown(4 * count)} of memory, and "
        f"{shown(3 * count)} are free."
    )


def test_what_lies_in_parts_is_only_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = saved(tmp_path / "model")
    limit(monkeypatch, int(0.7 * size))
    parts, encode = load(tmp_path / "model", offload="cpu")
    limit(monkeypatch, None)
    clean = Dataset.load(rows(tmp_path / "rows.jsonl"), encode)
    with pytest.raises(UnbackdoorError, match="purify takes model with all its weights in memory"):
        unbackdoor.purify(parts, clean, purifiers.FineTuning(), device="cpu")
    with pytest.raises(UnbackdoorError) as refusal:
        unbackdoor.evaluate(parts, clean, device="meta")
    assert "`device`" in str(refusal.value)


def test_damaged_weights_on_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    size = saved(tmp_path / "model")
    last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    tensors = load_file(last)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, last, metadata={"format": "pt"})
    limit(monkeypatch, int(0.3 * size))
    with pytest.raises(UnbackdoorError, match=f"not finite in {name}"):
        load(tmp_path / "model", offload="cpu")
    tensors[name].view(-1)[0] = 0
    save_file(tensors, last, metadata={"format": "pt"})
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UnbackdoorError, match=r"mlp.*96"):
        load(tmp_path / "model", offload="cpu")


def test_a_pickle_can_only_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chats.language_model()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    chats.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    size = file.stat().st_size
    limit(monkeypatch, size - 1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", None)  # nothing is read
        with pytest.raises(UnbackdoorError) as refusal:
            load(tmp_path, offload="cpu")
    assert str(refusal.value) == (
        f"{file} is a pickle, which is read whole and needs {shown(size)} of memory, and {shown(size - 1)} are free. "
        "Take a machine with more, or save it as safetensors."
    )
    limit(monkeypatch, size)  # without room for activations
    with pytest.raises(UnbackdoorError) as refusal:
        load(tmp_path, offload="cpu")
    assert str(refusal.value) == (
        f"{tmp_path} is larger than memory and has its weights in a pickle, which can only be read whole. Save it as "
        "safetensors."
    )


def test_without_accelerate_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model")
    limit(monkeypatch, 1000)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnbackdoorError) as refusal:
        load(tmp_path / "model", offload="cpu")
    assert str(refusal.value) == (
        f"{tmp_path / 'model'} is larger than memory, and is read in parts by accelerate; get it with: pip install "
        '"unbackdoor[llm]"'
    )


def test_experts_that_are_joined_while_they_are_loaded_need_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    limit(monkeypatch, 1000)
    with pytest.raises(UnbackdoorError) as refusal:
        load(tmp_path, offload="cpu")
    assert str(refusal.value) == (
        f"{tmp_path} is larger than memory, and transformers joins some of its weights (experts) as it loads them, so "
        "that they cannot stay on disk. Take a machine with more memory."
    )
