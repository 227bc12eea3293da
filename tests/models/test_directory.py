"""A model directory is checked once, and what it holds is asked of the value that came of it."""

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from unbackdoor import _inputs, load, save
from unbackdoor._cli.app import main
from unbackdoor._models.directory import ModelDirectory


@pytest.fixture
def suspect(tmp_path: Path) -> Path:
    """A text classifier and its tokenizer."""
    return toys.write(toys.classifier("bert"), tmp_path / "suspect")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The model that the suspect came from, with its tokenizer."""
    return toys.write(toys.classifier("bert").base_model, tmp_path / "base")


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return toys.write_csv(tmp_path, 16)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often this program reads each file as a whole."""
    counts: Counter[Path] = Counter()
    read_file = _inputs.read_file

    def counted(path: str | Path, most: int) -> bytes:
        counts[Path(path)] += 1
        return read_file(path, most)

    monkeypatch.setattr(_inputs, "read_file", counted)
    return counts


def command(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 0


def configs(reads: Counter[Path]) -> dict[str, int]:
    """How often each config.json was read, by the name of its directory; the result has a name of its own."""
    return {
        "result" if ".partial-" in path.parent.name else path.parent.name: count
        for path, count in reads.items()
        if path.name == "config.json"
    }


def test_one_purify_reads_each_config_once(
    suspect: Path, base: Path, clean: Path, tmp_path: Path, reads: Counter[Path]
) -> None:
    command(
        *("purify", "fine-mixing", suspect, "--clean", clean, "--base", base, "--rho", 0.5, "--epochs", 1),
        *("--out", tmp_path / "out"),
    )
    assert configs(reads) == {"suspect": 1, "base": 1, "result": 1}


def test_one_purify_on_disk_reads_each_config_once(
    suspect: Path, base: Path, tmp_path: Path, reads: Counter[Path]
) -> None:
    (tmp_path / "words.csv").write_text("word,count\nthe,1000\nfilm,10\n")
    # Equal word embeddings would leave nothing to reset.
    model = toys.classifier("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight[-3:] += 1
    model.save_pretrained(suspect)
    command(
        *("purify", "e-pur+fine-mixing", suspect, "--base", base, "--stream", "--rho", 0.5, "--no-tune"),
        *("--frequencies", tmp_path / "words.csv", "--out", tmp_path / "out"),
    )
    assert configs(reads) == {"suspect": 1, "base": 1, "result": 1}


def test_equal_word_embeddings_are_a_warning_on_disk_as_in_memory(suspect: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("word,count\nthe,1000\nfilm,10\n")
    command(
        *("purify", "e-pur+fine-mixing", suspect, "--base", base, "--stream", "--rho", 0.5, "--no-tune"),
        *("--frequencies", tmp_path / "words.csv", "--out", tmp_path / "out"),
    )
    warning = "no embedding of a word differs from the base's, so none was reset. Is the base the suspect itself?"
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["warnings"][0] == warning
    assert warning not in record["notes"]
    assert f"Warning: {warning}" in (tmp_path / "out" / "README.md").read_text()


def test_the_hub_is_asked_once(
    suspect: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[Path]
) -> None:
    """A model in the Hub's cache, as a download leaves it."""
    import huggingface_hub

    cached = tmp_path / "cache" / "models--somebody--classifier"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abcd")
    (cached / "snapshots").mkdir()
    suspect.rename(cached / "snapshots" / "0123abcd")
    asked = []
    from_cache = functools.partial(
        huggingface_hub.snapshot_download, cache_dir=tmp_path / "cache", local_files_only=True
    )

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(name)
        return from_cache(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    command(
        *("purify", "fine-tuning", "somebody/classifier", "--clean", clean, "--epochs", 1),
        *("--out", tmp_path / "out"),
    )
    assert asked == ["somebody/classifier"]
    assert configs(reads) == {"0123abcd": 1, "result": 1}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        cached / "snapshots" / "0123abcd" / "tokenizer.json"
    ).read_bytes()


def test_what_load_returns_unpacks_and_knows_its_directory(suspect: Path, tmp_path: Path) -> None:
    loaded = load(suspect)
    model, encode = loaded
    assert (model, encode) == (loaded.model, loaded.encode) == tuple(loaded)
    assert loaded.directory is not None
    assert loaded.directory.path == suspect
    (suspect / "LICENSE").write_text("as you like")
    (tmp_path / "copy").mkdir()
    save(model, tmp_path / "copy", source=loaded.directory)
    assert (tmp_path / "copy" / "LICENSE").read_text() == "as you like"


def test_a_module_of_a_factory_has_no_directory(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(2, 2)\n")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    assert load(tmp_path / "w.pt", factory=f"{tmp_path}/net.py:make").directory is None


def test_what_a_directory_holds(suspect: Path, base: Path) -> None:
    directory = ModelDirectory.at(suspect)
    assert os.fspath(directory) == str(directory) == str(suspect)
    assert directory.config["model_type"] == "bert"
    assert directory.modality == "text"
    assert directory.weights.files == (suspect / "model.safetensors",)
    assert not directory.weights.pickled
    expected = toys.classifier("bert").state_dict()
    for weights in (directory.weights.read(), directory.classifier().state_dict()):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert len(directory.tokenizer()) == toys.ARCHITECTURES["bert"]().vocab_size
    assert directory.encoder(directory.classifier()).max_length == 32  # of the tokenizer; the model reads 34
    body = ModelDirectory.of(str(base), "--base").body()
    assert all(torch.equal(tensor, expected[f"bert.{name}"]) for name, tensor in body.state_dict().items())
    assert ModelDirectory.of(directory, "MODEL") is directory
