"""Mixing on disk: the same bits as in memory, whatever the shards, and one sentence for what does not fit."""

import json
import logging
import math
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbackdoor import UnbackdoorError, purify
from unbackdoor._errors import IncompleteError
from unbackdoor._mixing.checkpoint import finite
from unbackdoor._mixing.masks import mix
from unbackdoor._mixing.stream import purify_stream
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.loading import load_base
from unbackdoor.purifiers import FineMixing

Weights = dict[str, Tensor]
CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def body(prefix: str, dtype: torch.dtype, seed: int, noise: float = 0.0) -> Weights:
    """A small body; with noise, it has moved by so much from where it was."""
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (50, 16)}
    for layer in range(3):
        shapes |= {f"encoder.layer.{layer}.dense.weight": (16, 16), f"encoder.layer.{layer}.dense.bias": (16,)}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        moved = noise * draw(*shape, seed=seed + 500 + number)
        weights[prefix + name] = (draw(*shape, seed=seed + number) + moved).to(dtype)
    return weights


def save(folder: Path, weights: Weights, shards: int = 1, config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(weights)
    parts = [names[number::shards] for number in range(shards)]
    listed: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> Weights:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def suspect() -> Weights:
    head = {"classifier.weight": draw(2, 16, seed=90), "classifier.bias": draw(2, seed=91)}
    positions = {"bert.embeddings.position_ids": torch.arange(7)}
    return body("bert.", torch.float32, 0, noise=0.1) | head | positions


@pytest.fixture
def base() -> Weights:
    return body("", torch.float32, 0)


def expected(suspect: Weights, base: Weights, rho: float, seed: int, **mode: Any) -> Weights:
    """The mix in memory, tensor by tensor."""
    return {
        name: mix(tensor, base[name.removeprefix("bert.")], name, rho, seed, **mode)
        if name.removeprefix("bert.") in base
        else tensor
        for name, tensor in suspect.items()
    }


def check_equal(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("mode", ["mask", "linear", "spherical"])
@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_the_stream_gives_the_bits_of_the_mix_in_memory(
    mode: Any, types: tuple[torch.dtype, torch.dtype], suspect: Weights, base: Weights, tmp_path: Path
) -> None:
    suspect = {name: part.to(types[0]) if part.is_floating_point() else part for name, part in suspect.items()}
    base = {name: part.to(types[1]) for name, part in base.items()}
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    purify_stream(*given, tmp_path / "out", rho=0.4, seed=3, mode=mode)
    check_equal(read(tmp_path / "out"), expected(suspect, base, 0.4, 3, mode=mode))


def test_tensors_of_several_chunks(tmp_path: Path) -> None:
    suspect = {"wide.weight": draw(1500, 1501), "odd.weight": draw(7, 3), "empty.weight": torch.empty(0, 4)}
    base = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in suspect.items()}
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    purify_stream(*given, tmp_path / "out", rho=0.4, seed=3)
    check_equal(read(tmp_path / "out"), {name: mix(suspect[name], base[name], name, 0.4, 3) for name in suspect})


def test_shards_are_kept_and_change_nothing(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    sharded = save(tmp_path / "sharded", suspect, shards=3)
    whole = save(tmp_path / "whole", suspect)
    bases = save(tmp_path / "base", base), save(tmp_path / "bases", base, shards=2)
    purify_stream(sharded, bases[0], tmp_path / "one", rho=0.5)
    purify_stream(whole, bases[1], tmp_path / "two", rho=0.5)
    check_equal(read(tmp_path / "one"), read(tmp_path / "two"))
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (sharded / name).read_bytes()
    for file in sharded.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(tmp_path / "one" / file.name, "pt") as after:
            assert list(before.keys()) == list(after.keys())
            assert before.metadata() == after.metadata()
    assert not (tmp_path / "two" / "model.safetensors.index.json").exists()


def test_the_record_says_what_was_done(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    source = save(tmp_path / "suspect", suspect)
    (source / "record.json").write_text('{"encode": {"columns": ["text"], "max_length": 64}}')
    record = purify_stream(source, save(tmp_path / "base", base), tmp_path / "out", rho=0.25, seed=9)
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["method"] == {
        "name": "fine-mixing",
        "parameters": {"rho": 0.25, "mode": "mask"},
        "repr": "purify_stream(rho=0.25, mode='mask')",
    }
    assert (record["seed"], record["scores"], record["warnings"]) == (9, None, [])
    assert record["source"] == {"model": "suspect", "base": "base", "factory": None}
    assert record["encode"] == {"columns": ["text"], "max_length": 64}
    assert record["notes"] == [
        "7 of 9 tensors (97.9% of the weights) have a counterpart in the base (bert.* in the model, * in the base); "
        "only in the model, and unchanged: classifier.bias, classifier.weight."
    ]
    assert "without clean examples" in (tmp_path / "out" / "README.md").read_text()


def test_the_method_and_the_command_of_the_record_can_be_reported(
    suspect: Weights, base: Weights, tmp_path: Path
) -> None:
    reported = {"name": "fine-mixing", "parameters": {"rho": 0.5}, "repr": "FineMixing(rho=0.5)"}
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    record = purify_stream(*given, tmp_path / "out", rho=0.5, method=reported, command="unbackdoor purify")
    assert (record["method"], record["command"]) == (reported, "unbackdoor purify")


def test_rows_are_reset_before_mixing(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    name = "bert.embeddings.word_embeddings.weight"
    purify_stream(*given, tmp_path / "out", rho=0.5, seed=1, reset_rows={name: [3, 49]})
    suspect[name][[3, 49]] = base["embeddings.word_embeddings.weight"][[3, 49]]
    check_equal(read(tmp_path / "out"), expected(suspect, base, 0.5, 1))


def test_the_head_of_two_classifiers_stays_the_suspects(suspect: Weights, tmp_path: Path) -> None:
    base = body("bert.", torch.float32, 0) | {"classifier.weight": draw(2, 16), "classifier.bias": draw(2)}
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    purify_stream(*given, tmp_path / "out", rho=0.0)
    found = read(tmp_path / "out")
    assert torch.equal(found["classifier.weight"], suspect["classifier.weight"])
    assert torch.equal(found["bert.encoder.layer.1.dense.weight"], base["bert.encoder.layer.1.dense.weight"])


def test_an_unrelated_base_is_warned_about(suspect: Weights, tmp_path: Path, caplog: Any) -> None:
    base = body("", torch.float32, 1000)
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    logging.getLogger("unbackdoor").propagate = True
    record = purify_stream(*given, tmp_path / "out", rho=0.5)
    assert record["warnings"][0].startswith("the base is probably not the model's ancestor: over 4 matrices")
    assert record["warnings"][0] in caplog.text
    assert f"Warning: {record['warnings'][0]}" in (tmp_path / "out" / "README.md").read_text()


def test_a_real_text_model_loads_again(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, num_labels=3)
    bare = transformers.BertModel(config)
    model = transformers.BertForSequenceClassification(config)
    model.bert.load_state_dict(bare.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    bare.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "suspect", max_shard_size="5KB")
    purify_stream(tmp_path / "suspect", tmp_path / "base", tmp_path / "out", rho=0.5, seed=4)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    check_equal(loaded.state_dict(), expected(model.state_dict(), bare.state_dict(), 0.5, 4))


def bert(layers: int = 2) -> Any:
    from transformers import BertConfig

    sizes = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(**sizes, num_hidden_layers=layers, num_labels=3)


@pytest.fixture
def related(tmp_path: Path) -> tuple[Path, Path, Weights]:
    """A classifier on disk, the directory of its base, which is still to be written, and that one's weights by name."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(bert())
    weights = {name: tensor.clone() for name, tensor in model.bert.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "suspect")
    (tmp_path / "base").mkdir()
    bert().save_pretrained(tmp_path / "base")
    return tmp_path / "suspect", tmp_path / "base", weights


def both(given: tuple[Path, Path], out: Path) -> tuple[Weights, Weights]:
    """A mix on disk, and the same in memory."""
    purify_stream(*given, out, rho=0.5, seed=3)
    in_memory = purify(
        ModelDirectory.of(given[0], "MODEL").classifier(),
        None,
        FineMixing(rho=0.5, tune=False),
        base=load_base(given[1]),
        seed=3,
    )
    return read(out), in_memory.model.state_dict()


@pytest.mark.parametrize(
    "written",
    [
        lambda name: f"model.bert.{name}",
        lambda name: f"encoder_model.{name}",
        lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("m.bias", "m.beta"),
        lambda name: None if name.startswith("pooler") else f"bert.{name}",
        lambda name: None if name.startswith(("pooler", "encoder.layer.1.output.dense")) else name,
    ],
    ids=["two prefixes", "another prefix", "gamma and beta", "no pooler", "damaged"],
)
def test_what_the_bases_files_hold_is_mixed_and_nothing_else(
    written: Callable[[str], str | None], related: tuple[Path, Path, Weights], tmp_path: Path
) -> None:
    source, origin, weights = related
    named = {found: tensor for name, tensor in weights.items() if (found := written(name)) is not None}
    save_file(named, origin / "model.safetensors", metadata={"format": "pt"})
    there = {f"bert.{name}" for name in weights if written(name) is not None}
    before = read(source)
    on_disk, in_memory = both((source, origin), tmp_path / "out")
    check_equal(on_disk, in_memory)
    for name, tensor in before.items():
        wanted = mix(tensor, weights[name.removeprefix("bert.")], name, 0.5, 3) if name in there else tensor
        assert torch.equal(on_disk[name], wanted), name


def test_a_base_of_another_depth_is_warned_about(
    related: tuple[Path, Path, Weights], tmp_path: Path, caplog: Any
) -> None:
    from transformers import BertModel

    source, _, weights = related
    logging.getLogger("unbackdoor").propagate = True
    shallow, deep = BertModel(bert(1)), BertModel(bert(4))
    for model in (shallow, deep):
        known = {name: tensor for name, tensor in weights.items() if name in model.state_dict()}
        model.load_state_dict(known, strict=False)
    shallow.save_pretrained(tmp_path / "shallow")
    deep.save_pretrained(tmp_path / "deep")
    # Six matrices a layer, and the pooler; embeddings do not count.
    for base, left, unused, present in (("shallow", 6, 0, 7), ("deep", 0, 12, 25)):
        record = purify_stream(source, tmp_path / base, tmp_path / f"out {base}", rho=0.5)
        assert record["warnings"] == [
            f"model and base differ in architecture: apart from embeddings, {left} of the model's 13 matrices stay "
            f"unchanged, since the base has none for them, and {unused} of the base's {present} are not used. "
            "Unchanged matrices keep their part of a backdoor. Take the pre-trained model that it came from."
        ]
        assert record["warnings"][0] in caplog.text
        again = purify(
            ModelDirectory.of(source, "MODEL").classifier(),
            None,
            FineMixing(rho=0.5, tune=False),
            base=load_base(tmp_path / base),
        )
        assert again.record["warnings"] == record["warnings"]


def test_embeddings_alone_make_no_base(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    words = {name: torch.cat([tensor] * 400) for name, tensor in base.items() if "word_embeddings" in name}
    large = suspect | {f"bert.{name}": tensor + 0.1 for name, tensor in words.items()}
    given = save(tmp_path / "suspect", large), save(tmp_path / "base", words)
    with pytest.raises(UnbackdoorError) as refusal:
        purify_stream(*given, tmp_path / "out", rho=0.5)
    assert str(refusal.value) == (
        "the base has another architecture: apart from embeddings, only 0 of the model's 3 matrices have a counterpart "
        "of the same name and shape there. Take the pre-trained model that it came from as `base`."
    )


def test_a_tokenizer_with_more_tokens_than_rows(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    words = {f"word{number}": number for number in range(50)}
    added = [{"id": 51, "content": "[X]"}]
    (given[0] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": added}))
    with pytest.raises(UnbackdoorError) as refusal:
        purify_stream(*given, tmp_path / "out", rho=0.5)
    assert str(refusal.value) == (
        f"{given[0]} has a tokenizer of 52 tokens, but its model has embeddings for 50. Take the tokenizer that it was "
        "trained with."
    )
    (given[0] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": list(words)}}))
    purify_stream(*given, tmp_path / "out", rho=0.5)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_given_is_checked(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    out, name = tmp_path / "out", "bert.embeddings.word_embeddings.weight"
    refused: list[tuple[str, dict[str, Any]]] = [
        ("`rho` must be a number between 0 and 1, got 1.5.", {"rho": 1.5}),
        ("`rho` must be a number between 0 and 1, got nan.", {"rho": float("nan")}),
        ("`rho` must be a number between 0 and 1, got '0.3'.", {"rho": "0.3"}),
        ("`rho` must be a number between 0 and 1, got True.", {"rho": True}),
        ("`mode` must be one of mask, linear, spherical, sign-elected, got 'foo'.", {"rho": 0.5, "mode": "foo"}),
        ("`seed` must be a whole number, at least 0 and less than 2**63, got 1.5.", {"rho": 0.5, "seed": 1.5}),
        (f"`reset_rows` of {name} must be from 0 to 49, got 50.", {"rho": 0.5, "reset_rows": {name: [1, 50]}}),
        (
            "reset_rows must name matrices that model and base have in common, got classifier.weight.",
            {"rho": 0.5, "reset_rows": {"classifier.weight": [0]}},
        ),
    ]
    for message, options in refused:
        with pytest.raises(UnbackdoorError) as refusal:
            purify_stream(*given, out, **options)
        assert str(refusal.value) == message
    with pytest.raises(UnbackdoorError, match=r"suspect is the input itself; `out` must be another directory\.$"):
        purify_stream(*given, given[0], rho=0.5)
    assert not out.exists()


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 5)


def spoil(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if name.endswith("layer.1.dense.weight"))][3, 4] = float("nan")
    save_file(weights, file)


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def quantize(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"bits": 4}}))


def eight_bits(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("which", ["suspect", "base"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            truncate,
            r"model\.safetensors ends early: its header promises [\d,]+ bytes, the file has [\d,]+\. Fetch it a",
        ),
        (spoil, r"model\.safetensors has values that are not finite in (bert\.)?encoder\.layer\.1\.dense\.weight; fin"),
        (pickle, r"has its weights in a pickle, but `stream` needs safetensors\. Leave `stream` out, or save the mod"),
        (
            quantize,
            r"(suspect|base) is quantised \(quantization_config\), and such weights cannot be tuned or mixed\. Give",
        ),
        (eight_bits, r"as F8_E4M3; weights of type F64, F32, F16, BF16 can be mixed\. Fetch those\.$"),
    ],
)
def test_damaged_files(
    damage: Callable[[Path], None], message: str, which: str, suspect: Weights, base: Weights, tmp_path: Path
) -> None:
    given = {"suspect": save(tmp_path / "suspect", suspect), "base": save(tmp_path / "base", base)}
    damage(given[which])
    with pytest.raises(UnbackdoorError, match=message):
        purify_stream(given["suspect"], given["base"], tmp_path / "out", rho=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "suspect"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    """Against torch's own answer, number by number: the largest and smallest of a type, zeros, infinities, NaN."""
    limits = torch.finfo(dtype)
    usual = [0.0, -0.0, 1.0, -1.0, limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_normal / 2]
    assert finite(torch.tensor(usual, dtype=dtype))
    assert finite(torch.tensor([], dtype=dtype))
    for odd in (math.inf, -math.inf, math.nan, -math.nan):
        for numbers in ([odd], [*usual, odd], [odd, -1.0], [-1.0, odd, -2.0]):
            given = torch.tensor(numbers, dtype=dtype)
            assert not given.isfinite().all()
            assert not finite(given)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.randint(torch.iinfo(whole).min, torch.iinfo(whole).max, (4000,), dtype=whole)
    for number in bits.view(dtype):
        assert finite(number[None]) == bool(number.isfinite())


def test_shards_that_do_not_fit_their_index(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    given = save(tmp_path / "suspect", suspect, shards=2), save(tmp_path / "base", base)
    first, second = (given[0] / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))

    def refusal() -> str:
        with pytest.raises(UnbackdoorError) as caught:
            purify_stream(*given, tmp_path / "out", rho=0.5)
        return str(caught.value).removeprefix(f"{given[0]} ")

    weights = load_file(second)
    gone = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, second)
    assert refusal() == f"lists {gone} in the shard {second.name}, which lacks it. Fetch it again."
    twice = next(iter(load_file(first)))
    save_file(weights | {twice: torch.ones(3)}, second)
    assert refusal() == f"has {twice} twice, in {first.name} and {second.name}. Fetch it again."
    second.unlink()
    assert refusal() == f"lists the shard {second.name}, which is missing. Fetch it again."


def test_values_that_the_suspects_type_cannot_hold(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    suspect = {name: part.half() if part.is_floating_point() else part for name, part in suspect.items()}
    base["encoder.layer.0.dense.bias"][2] = 1e6
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    with pytest.raises(UnbackdoorError) as refusal:
        purify_stream(*given, tmp_path / "out", rho=0.5)
    assert str(refusal.value) == (
        f"{given[1]}/model.safetensors has values in encoder.layer.0.dense.bias that are too large for the model's "
        "float16. Take a base of that type."
    )


def test_a_full_disk_leaves_nothing(suspect: Weights, base: Weights, tmp_path: Path) -> None:
    given = save(tmp_path / "suspect", suspect), save(tmp_path / "base", base)
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))  # what a full disk looks like from inside
    try:
        with pytest.raises(IncompleteError, match=r"out could not be written: File too large\. Nothing of it was kept"):
            purify_stream(*given, tmp_path / "out", rho=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "suspect"]


# --------------------------------------------------------------------------------------------------------- a large one


@pytest.fixture
def anonymous_memory() -> Iterator[list[int]]:
    """The peak of this process's anonymous memory above what it was, in bytes, once the block has ended."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    seen, done = [now()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(now())
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    yield seen
    done.set()
    watching.join()


@pytest.mark.slow
def test_a_checkpoint_of_two_gigabytes(anonymous_memory: list[int], tmp_path: Path) -> None:
    folders = [tmp_path / "suspect", tmp_path / "base"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
    layers, side = 17, 8192  # 1.14 billion weights
    listed = {}
    drawn = torch.randn(side, side, dtype=torch.bfloat16)
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        weight = drawn.roll(layer, dims=0)  # drawing each again would take longer than mixing them
        for folder in reversed(folders):
            save_file({f"model.layers.{layer}.weight": weight}, folder / file)
            weight.add_(0.1)
        listed[f"model.layers.{layer}.weight"] = file
        del weight
    del drawn
    for folder in folders:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    before = len(anonymous_memory)
    start = anonymous_memory[-1]
    record = purify_stream(folders[0], folders[1], tmp_path / "out", rho=0.5, seed=2)
    used = max(anonymous_memory[before:]) - start
    print(f"{record['seconds']:.1f} s, {used / 2**20:.0f} MiB of anonymous memory")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size > 2 * 10**9
    assert used < 2 * side * side  # less than one tensor
    name = f"model.layers.{layers - 1}.weight"
    parts = (load_file(folder / listed[name])[name] for folder in (*folders, tmp_path / "out"))
    suspect, base, mixed = parts
    assert torch.equal(mixed, mix(suspect, base, name, 0.5, 2))
