"""Files that nobody vouches for: each refusal by its sentence, and no code that a pickle carries is ever run."""

import argparse
import bz2
import gzip
import json
import logging
import lzma
import os
import pickle
import re
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from fixtures import SmallCNN
from unbackdoor import UnbackdoorError, load
from unbackdoor._models.hub import _UNWANTED
from unbackdoor._models.loading import load_base
from unbackdoor._models.untrusted_weights import read_weights

FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3))
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path}/net.py:make"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3)).state_dict())


def refusal(path: Path) -> str:
    with pytest.raises(UnbackdoorError) as refused:
        read_weights(path)
    assert refused.value.exit_code == 2
    return str(refused.value)


# safetensors


def stored(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file by its specification: the header's length, the header as JSON, the numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_written_by_the_specification_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(stored({"a": entry(0, 8, [2])}, struct.pack("<2f", 1.5, -2.0)))
    assert read_weights(path)["a"].tolist() == [1.5, -2.0]


def test_a_header_that_begins_as_a_pickle_does_is_read(tmp_path: Path) -> None:
    """The first bytes are the header's length; 640 bytes are 80 02, as in a pickle of protocol 2."""
    path, header = tmp_path / "w.safetensors", json.dumps({"a": entry(0, 4, [1])}).encode()
    path.write_bytes(stored(header + b" " * (640 - len(header)), struct.pack("<f", 1.5)))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert read_weights(path)["a"].tolist() == [1.5]


WRONG_HEADER = "{path} has a header that is not valid safetensors. Fetch it again."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path} ends early: a safetensors file has at least 8 bytes, it has 0. Fetch it again."),
        (b"\x01\x02", "{path} ends early: a safetensors file has at least 8 bytes, it has 2. Fetch it again."),
        (
            struct.pack("<Q", 100) + b"{}",
            "{path} is not a safetensors file, or ends inside its header (100 bytes promised, 10 in the file). "
            "Fetch it again.",
        ),
        (
            struct.pack("<Q", 2**63) + b"{}" * 50,
            "{path} is not a safetensors file, or ends inside its header (9,223,372,036,854,775,808 bytes promised, "
            "108 in the file). Fetch it again.",
        ),
        (stored(b"not json at all", b""), WRONG_HEADER),
        (stored(b"\xff\xfe\xfd\xfc", b""), WRONG_HEADER),
        (stored(b"[1, 2]", b""), WRONG_HEADER),
        (stored(b"[" * 100_000, b""), WRONG_HEADER),
        (stored({"a": 3}, b""), WRONG_HEADER),
        (stored({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), WRONG_HEADER),
        (stored({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"), WRONG_HEADER),
        (stored({"a": entry(0, 4, [1], "F77")}, b"1234"), WRONG_HEADER),
        (stored({"a": entry(0, 4, [None])}, b"1234"), WRONG_HEADER),
        (
            stored({"a": entry(0, 8, [3])}, b"12345678"),
            "{path} has a wrong header: a is F32 of shape [3], but spans 8 bytes. Fetch it again.",
        ),
        (
            stored({"a": entry(0, 8, [2], "F16")}, b"12345678"),
            "{path} has a wrong header: a is F16 of shape [2], but spans 8 bytes. Fetch it again.",
        ),
        (
            stored({"a": entry(-4, 4, [2])}, b"1234"),
            "{path} has a wrong header: a is F32 of shape [2], but spans 8 bytes. Fetch it again.",
        ),
        (
            stored({"a": entry(0, 8, [2])}, b"123456789"),
            "{path} is too long: its header promises 63 bytes, the file has 64. Fetch it again.",
        ),
    ],
)
def test_a_damaged_safetensors_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    if "63 bytes" in message:  # the header's own length is counted here, not by hand
        message = message.replace("63", str(len(content) - 1)).replace("64", str(len(content)))
    assert refusal(path) == message.format(path=path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},  # they overlap
        {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},  # a hole between them
        {"a": entry(0, 12, [3.0])},
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"__metadata__":{"format":5}}',
    ],
)
def test_what_the_format_forbids_is_refused_in_one_sentence(header: dict[str, Any] | bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(stored(header, b"123456789012"))
    message = refusal(path)
    assert message.startswith(f"{path} has a wrong header: ")
    assert message.endswith(". Fetch it again.")
    assert "\n" not in message


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    """Whatever its length: the cut may be in the length, the header, or the numbers."""
    whole = tmp_path / "whole.safetensors"
    save_file(weights(), whole)
    content = whole.read_bytes()
    path = tmp_path / "w.safetensors"
    data = len(content) - sum(tensor.numel() * 4 for tensor in weights().values())
    for length in {0, 5, 8, 9, data // 2, data - 1, data, data + 1, (data + len(content)) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        message = refusal(path)
        assert message.endswith("Fetch it again.")
        if length >= data:
            promise = f"its header promises {len(content):,} bytes, the file has {length:,}."
            assert message == f"{path} ends early: {promise} Fetch it again."


# pickles


class Payload:
    """Pickled, it asks to run a command that writes a file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def memoised(marker: Path) -> bytes:
    """Protocol 4 by hand: the names of the function are stored early and only recalled where it is asked for."""

    def text(words: str) -> bytes:
        return b"\x8c" + bytes([len(words)]) + words.encode()

    names = text("os") + b"\x94" + b"0" + text("system") + b"q\x07" + b"0"  # MEMOIZE, POP; BINPUT 7, POP
    call = b"h\x00" + b"h\x07" + b"\x93" + text(f"touch {marker}") + b"\x85" + b"R"  # BINGET twice, STACK_GLOBAL
    return b"\x80\x04" + names + call + b"."


def write_pickle(kind: str, marker: Path, path: Path) -> str:
    """Write a file that creates `marker` when it is unpickled; what it asks to run."""
    command = f"touch {marker}"
    system, wanted = Payload(os.system, command), f"{os.system.__module__}.system"
    execute = Payload(exec, f"open({str(marker)!r}, 'w').close()")
    if kind.startswith("plain"):
        path.write_bytes(pickle.dumps({"weight": system}, protocol=int(kind[-1])))
    elif kind == "zip":
        torch.save({"weight": torch.zeros(2), "extra": system}, path)
    elif kind == "legacy":
        torch.save({"weight": torch.zeros(2), "extra": execute}, path, _use_new_zipfile_serialization=False)
        wanted = "builtins.exec"
    elif kind == "exec":
        torch.save(OrderedDict(weight=torch.zeros(2), extra=execute), path)
        wanted = "builtins.exec"
    elif kind == "zip protocol 4":
        torch.save({"weight": torch.zeros(2), "extra": system}, path, pickle_protocol=4)
    elif kind == "memoised":
        path.write_bytes(memoised(marker))
        wanted = "os.system"
    elif kind == "module":
        torch.save(nn.Sequential(nn.Linear(2, 2)), path)
        wanted = "torch.nn.modules.container.Sequential"
    elif kind == "own class":
        torch.save(SmallCNN(), path)
        wanted = "fixtures.SmallCNN"
    return "__builtin__.exec" if wanted == "builtins.exec" and kind in ("legacy", "exec") else wanted


KINDS = ["plain 0", "plain 2", "plain 4", "plain 5", "zip", "zip protocol 4", "legacy", "exec", "memoised", "module"]


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin"])
@pytest.mark.parametrize("kind", [*KINDS, "own class"])
def test_code_in_a_pickle_is_named_and_not_run(kind: str, name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "written", tmp_path / name
    wanted = write_pickle(kind, marker, path)
    way_out = "Ask its owner for safetensors."
    if kind in ("module", "own class"):
        way_out = "It is a whole module: ask its owner for model.state_dict() as safetensors, and give `factory`."
    assert refusal(path) == f"{path} is a pickle that asks to run {wanted}; it was not loaded. {way_out}"
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["plain 0", "plain 2", "plain 4", "memoised"])
def test_these_payloads_do_run_where_they_are_unpickled(kind: str, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    marker, path = tmp_path / "written", tmp_path / "w.pt"
    write_pickle(kind, marker, path)
    pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_pickle_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for length in (0, 1, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        message = refusal(path)
        assert re.fullmatch(
            rf"{re.escape(str(path))} is damaged or not a PyTorch weights file \([^\n]+[^.\n]\)\. Fetch it again\.",
            message,
        ), message


def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Torch's own words would advise `weights_only=False`, which runs whatever the pickle asks for."""
    path = tmp_path / "w.pt"
    for content in (b"PAR1, or anything else", pickle.dumps({"a": 1}, protocol=4)):
        path.write_bytes(content)
        assert (
            refusal(path)
            == f"{path} is damaged or not a PyTorch weights file (not a pickle of tensors). Fetch it again."
        )
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["zip", "tar", "gzip", "bzip2", "xz"])
def test_packed_weights_are_named_as_such(kind: str, tmp_path: Path) -> None:
    """As clouds and mails have them; of a tar torch itself would advise `weights_only=False`."""
    path, weights_file = tmp_path / "w.pt", tmp_path / "model.pth"
    torch.save(weights(), weights_file)
    match kind:
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(weights_file, "model.pth")
        case "tar":
            with tarfile.open(path, "w") as packed:
                packed.add(weights_file, "model.pth")
        case _:
            pack = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind]
            path.write_bytes(pack(weights_file.read_bytes()))
    assert refusal(path) == (
        f"{path} is packed ({kind}), and packed weights are not read. Unpack it, and give the file in it."
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
def test_state_dicts_are_read_as_trainers_save_them(wrapper: str | None, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    content: Any = OrderedDict(weights())
    if wrapper is not None:
        content = {wrapper: content, "epoch": 3, "accuracy": 0.93}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    read = read_weights(path)
    assert read.keys() == weights().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights().items())


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {}, {"epoch": 3}, {"a": torch.zeros(1), "b": 2}])
def test_anything_but_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    assert refusal(path) == (
        f"{path} does not hold named tensors; a state dict is expected. Save model.state_dict() as safetensors."
    )


# what both have in common


def test_plain_values_next_to_the_tensors_are_left_out(
    factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As some save one dictionary of all; torch itself has an entry for the extra state of a layer."""
    caplog.set_level(logging.INFO, "unbackdoor")
    torch.save({**weights(), "epoch": 3, "1._extra_state": None}, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth", factory=factory)
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in weights().items())
    assert caplog.messages == ["w.pth: epoch, 1._extra_state are no tensors and are left out."]
    torch.save({**weights(), "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    with pytest.raises(UnbackdoorError, match="does not hold named tensors"):
        load(tmp_path / "w.pth", factory=factory)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "w.safetensors") == (
        f"{tmp_path}/w.safetensors does not exist; a weights file (.safetensors, .pt, .pth, .bin) is expected."
    )


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_that_are_not_finite_are_refused(name: str, dtype: torch.dtype, strange: float, tmp_path: Path) -> None:
    path = tmp_path / name
    content = {name: tensor.to(dtype) for name, tensor in weights().items()}
    content["3.weight"][1, 2] = strange
    save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
    assert refusal(path) == (
        f"{name} has values that are not finite in 3.weight; finite weights are expected. Fetch it again, or ask its "
        "owner for a working model."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("1.bias"), "it lacks 1 tensor(s) (1.bias)"),
        (lambda w: w.clear() or w.update(x=torch.zeros(1)), None),
        (lambda w: w.update({"3.scale": torch.ones(3)}), "it has 1 that it does not know (3.scale)"),
        (
            lambda w: w.update({"3.weight": torch.ones(4, 5), "3.bias": torch.ones(4)}),
            "it has 2 of another shape (3.bias is (4,), not (3,); 3.weight is (4, 5), not (3, 5))",
        ),
        (
            lambda w: (w.pop("3.bias"), w.update({"a": torch.ones(1), "1.weight": torch.ones(5, 49)})),
            "it lacks 1 tensor(s) (3.bias) and has 1 that it does not know (a) and has 1 of another shape (1.weight is "
            "(5, 49), not (5, 48))",
        ),
    ],
)
def test_weights_that_do_not_fit_the_factory_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], message: str | None, factory: str, tmp_path: Path
) -> None:
    content = weights()
    change(content)
    path = tmp_path / "w.safetensors"
    save_file(content, path)
    with pytest.raises(UnbackdoorError) as refused:
        load(path, factory=factory)
    if message is None:
        message = "it lacks 4 tensor(s) (1.bias, 1.weight, 3.bias, ...) and has 1 that it does not know (x)"
    assert str(refused.value) == f"{path} does not fit {factory}: {message}. Check the architecture."


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_the_wrapper_of_a_part_is_taken_out_of_its_names(
    wrapper: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As PyTorch's own example does it to AlexNet and VGG: `model.features = DataParallel(model.features)`."""
    (tmp_path / "net.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "def make(): return nn.Sequential(OrderedDict(features=nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "
        "fc=nn.Linear(3, 2)))\n"
    )
    plain = {"features.1.weight": torch.rand(3, 4), "features.1.bias": torch.rand(3)}
    plain |= {"fc.weight": torch.rand(2, 3), "fc.bias": torch.rand(2)}
    path = tmp_path / "w.pt"
    wrapped = {prefix + name.replace("features.", f"features.{wrapper}"): part for name, part in plain.items()}
    torch.save({"state_dict": wrapped, "state_dict_of_critic": {"a": torch.zeros(1)}}, path)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(path, factory=f"{tmp_path}/net.py:make").model.state_dict()
    assert all(torch.equal(loaded[name], part) for name, part in plain.items())
    assert caplog.messages[1:] == [
        f"{path}: its tensors are read without the wrappers in their names, as in {prefix}features.{wrapper}1.bias.",
        *[f"{path}: its tensors are read without {prefix} before their names."] * bool(prefix),
    ]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.encoder.", "module._orig_mod."])
def test_a_prefix_that_a_wrapper_put_before_all_names_is_taken_off(
    prefix: str, factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in weights().items()}, path)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(path, factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())
    assert caplog.messages == [f"{path}: its tensors are read without {prefix} before their names."]


def test_what_stands_next_to_a_wrapped_model_is_left_out(
    factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lightning keeps the weights of a loss, and SWA a count, next to the model."""
    path = tmp_path / "w.pt"
    wrapped = {f"model.{name}": tensor for name, tensor in weights().items()}
    torch.save({"state_dict": {**wrapped, "criterion.weight": torch.ones(3)}}, path)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(path, factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())
    assert caplog.messages == [
        "w.pt: the weights under state_dict are used.",
        f"{path}: its tensors are read without model. before their names; criterion.weight without it is left out.",
    ]


@pytest.mark.parametrize(
    ("names", "numbers", "asked"),
    [
        (("0.mean", "0.std"), ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]), True),  # of nn.Sequential
        (("normalize.mu", "normalize.sigma"), ([0.5], [0.25]), True),
        (("_mean", "_std"), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), True),
        (("loss.mean", "loss.std"), ([0.1] * 64, [1.0] * 64), False),  # of features
        (("0.mean", "0.count"), ([0.5], [2.0]), False),
    ],
)
def test_a_normalisation_that_the_module_leaves_out_is_warned_of(
    names: tuple[str, str], numbers: Any, asked: bool, factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Robust models come as a normalisation in front of a network; without it, every input is another one."""
    path = tmp_path / "w.pt"
    beside = {name: torch.tensor(entry) for name, entry in zip(names, numbers, strict=True)}
    torch.save({**beside, **{f"1.{name}": tensor for name, tensor in weights().items()}}, path)
    load(path, factory=factory)
    mean, std = (",".join(f"{number:g}" for number in entry) for entry in numbers)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == asked * [
        f"{path}: it holds a normalisation of the inputs, which the module leaves out. Unless that normalises them "
        f"itself, give `mean={mean}` and `std={std}`."
    ]


def test_weights_by_the_name_of_the_other_format_are_named(factory: str, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.bin")
    torch.save(weights(), tmp_path / "w.safetensors")
    torch.save(weights(), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name, kind, way_out in (
        ("w.bin", "a safetensors file", "Let its name end in .safetensors."),
        ("w.safetensors", "a pickle", "Let its name end in .pt, or in a directory .bin."),
        ("old.safetensors", "a pickle", "Let its name end in .pt, or in a directory .bin."),
    ):
        with pytest.raises(UnbackdoorError) as refused:
            load(tmp_path / name, factory=factory)
        assert str(refused.value) == (
            f"{tmp_path / name} is {kind} by its content, although its name says otherwise. {way_out}"
        )


def test_a_prefix_that_the_module_has_is_put_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "net.py").write_text(FACTORY + "\ndef wrapped():\n    return nn.DataParallel(make())\n")
    path = tmp_path / "w.safetensors"
    save_file(weights(), path)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(path, factory=f"{tmp_path}/net.py:wrapped").model.state_dict()
    assert all(torch.equal(loaded[f"module.{name}"], tensor) for name, tensor in weights().items())
    assert caplog.messages == [f"{path}: its tensors are read with module. before their names."]


def test_a_directory_with_weights_of_another_name_says_to_give_the_file(factory: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save(weights(), tmp_path / "run" / "best.pth")
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path / "run", factory=factory)
    assert str(refused.value) == (
        f"{tmp_path}/run has no model.safetensors, which a directory needs with `factory`. Give the file with the "
        "weights itself."
    )


def test_two_models_in_one_state_dict_are_refused(factory: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    owners = {"student": 1.0, "teacher": 2.0}
    both = {f"{owner}.{name}": tensor * by for name, tensor in weights().items() for owner, by in owners.items()}
    save_file(both, path)
    with pytest.raises(UnbackdoorError) as refused:
        load(path, factory=factory)
    assert str(refused.value) == (
        f"{path} holds the weights of 2 such modules (student.* and teacher.*); one is expected. Save one of them "
        "alone."
    )


def test_a_model_that_is_there_twice_is_read(factory: str, tmp_path: Path) -> None:
    """The library robustness saves its networks so: once by themselves, and once within their attacker."""
    owners = ("module.model", "module.attacker.model")
    both = {f"{owner}.{name}": tensor.clone() for name, tensor in weights().items() for owner in owners}
    torch.save({"model": both, "epoch": 3}, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


def test_a_prefix_is_taken_off_only_where_all_of_the_module_comes_out(factory: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    some = {f"module.{name}": tensor for name, tensor in weights().items() if name != "3.bias"}
    save_file(some, path)
    with pytest.raises(UnbackdoorError, match=r"it lacks 4 tensor\(s\) .* and has 3 that it does not know \(module\.1"):
        load(path, factory=factory)


def test_of_several_state_dicts_the_one_that_fits_is_taken(
    factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As attacks with a generator save them."""
    path = tmp_path / "w.pt"
    others = {name: tensor * 2 for name, tensor in nn.Linear(2, 2).state_dict().items()}
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9).state_dict()
    torch.save({"netG": others, "netC": weights(), "optimizerC": optimizer, "epoch": 7}, path)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(path, factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())
    assert caplog.messages == ["w.pt: the weights under netC are used, those under netG are left out."]
    assert refusal(path) == (
        f"{path} holds 2 state dicts (netG, netC), and it is unclear which of them is the model's; one is expected. "
        "Save it alone: torch.save(torch.load('w.pt')['netG'], 'weights.pt')."
    )


@pytest.mark.parametrize("first", ["state_dict", "state_dict_ema"])
def test_averaged_weights_next_to_the_others_are_named(
    first: str, factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.pt"
    averaged = {name: tensor + 1 for name, tensor in weights().items()}
    content = {"state_dict": weights(), "state_dict_ema": averaged}
    torch.save({name: content[name] for name in (first, *content)}, path)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(path, factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())
    assert caplog.messages == ["w.pt: the weights under state_dict are used, those under state_dict_ema are left out."]


@pytest.mark.parametrize("shape", [lambda state: [state, 0.91], lambda state: {"best": (state, {"lr": 0.1})}])
def test_a_state_dict_may_lie_in_a_list(shape: Any, factory: str, tmp_path: Path) -> None:
    torch.save(shape(weights()), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


def test_what_a_profiler_left_behind_is_no_fault(factory: str, tmp_path: Path) -> None:
    counts = {"total_ops": torch.zeros(1), "1.total_ops": torch.ones(1), "1.total_params": torch.ones(1)}  # of thop
    torch.save({**weights(), **counts}, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", factory=factory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_another_type_than_the_module_is_reported(
    dtype: torch.dtype, factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    torch.save({name: tensor.to(dtype) for name, tensor in weights().items()}, tmp_path / "w.pt")
    assert {tensor.dtype for tensor in load(tmp_path / "w.pt", factory=factory).model.state_dict().values()} == {
        torch.float32
    }
    what = "whose type is kept. For the other one, let the factory return the module in it."
    if dtype != torch.float64:
        what = "which is computed with. They are written as they came."
    assert caplog.messages == [f"w.pt: weights are {str(dtype)[6:]} in the file and float32 in the module, {what}"]


def test_masks_of_pruning_are_named(factory: str, tmp_path: Path) -> None:
    pruned = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3))
    prune.random_unstructured(pruned[3], "weight", 0.5)
    torch.save(pruned.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UnbackdoorError, match=r"Its layers are pruned by torch\.nn\.utils\.prune: save it after"):
        load(tmp_path / "w.pt", factory=factory)


def test_a_count_of_batches_may_be_missing(tmp_path: Path) -> None:
    """PyTorch wrote none before version 0.4.1, and some converters write none today."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))\n"
    )
    made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict()
    del made["1.num_batches_tracked"]
    torch.save(made, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", factory=f"{tmp_path}/net.py:make").model.state_dict()
    assert loaded["1.num_batches_tracked"] == 0
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.items())


def test_of_tied_weights_one_is_enough(tmp_path: Path) -> None:
    """safetensors' `save_model` writes tensors that share their memory once."""
    from safetensors.torch import save_model

    program = """
from torch import nn

def make():
    made = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    made[2].weight = made[1].weight
    return made
"""
    (tmp_path / "net.py").write_text(program)
    made = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    made[2].weight = made[1].weight
    save_model(made, str(tmp_path / "w.safetensors"))
    assert len(load_file(tmp_path / "w.safetensors")) == 5
    loaded = load(tmp_path / "w.safetensors", factory=f"{tmp_path}/net.py:make").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    assert refusal(path) == (
        f"{path} is a TorchScript or exported program, which is not run; a state dict is expected. Ask its owner for "
        "model.state_dict() as safetensors, and give `factory`."
    )
    exported = tmp_path / "w.pt2"
    with zipfile.ZipFile(exported, "w") as archive:  # as torch.export.save writes it
        archive.writestr("w/archive_format", "pt2")
    assert refusal(exported).startswith(f"{exported} is a TorchScript or exported program, which is not run;")


def test_numpy_next_to_the_weights_is_named(tmp_path: Path) -> None:
    """As in the attack_result.pt of BackdoorBench."""
    path = tmp_path / "attack_result.pt"
    torch.save({"model_name": "preactresnet18", "model": weights(), "bd_train": {"indicator": np.ones(4)}}, path)
    assert re.fullmatch(
        rf"{re.escape(str(path))} holds NumPy objects \(numpy\.\S+\) besides its weights, but only tensors are read "
        r"from a pickle\. Ask its owner for the state dict alone, or, if nothing is at stake, save it: "
        r"torch\.save\(torch\.load\('attack_result\.pt', weights_only=False\)\['model'\], 'weights\.pt'\)\.",
        refusal(path),
    )
    marker = tmp_path / "written"
    torch.save({"model": weights(), "data": np.ones(4), "extra": Payload(os.system, f"touch {marker}")}, path)
    assert "is a pickle that asks to run" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "settings", [argparse.Namespace(lr=0.1), Path("logs"), defaultdict(list), [np.float64(93.1), Path("logs")]]
)
def test_the_settings_of_a_training_next_to_the_weights_are_named(settings: object, tmp_path: Path) -> None:
    """As timm saves its arguments, and Lightning its counters."""
    path = tmp_path / "last.pth.tar"
    torch.save({"epoch": 3, "state_dict": weights(), "args": settings}, path)
    message = refusal(path)
    assert message.startswith(f"{path} holds ")
    assert " besides its weights, but only tensors are read from a pickle. Ask its owner for" in message
    assert message.endswith(
        "save it: torch.save(torch.load('last.pth.tar', weights_only=False)['state_dict'], 'weights.pt')."
    )


@pytest.mark.parametrize("wanted", ["numpy.testing._private.utils.runstring", "pathlib.os.system", "builtins.exec"])
def test_nobody_is_asked_to_load_what_runs_code(wanted: str, tmp_path: Path) -> None:
    module, _, name = wanted.rpartition(".")
    stream = b"\x80\x02}q\0X\x05\0\0\0model" + f"c{module}\n{name}\n".encode() + b"s."
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", stream)
        archive.writestr("w/version", "3")
    assert refusal(tmp_path / "w.pt") == (
        f"{tmp_path}/w.pt is a pickle that asks to run {wanted}; it was not loaded. Ask its owner for safetensors."
    )


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("tf_model.h5", "TensorFlow or Keras"),
        ("flax_model.msgpack", "Flax"),
        ("model.ONNX", "ONNX"),
        ("model.Q4_K_M.gguf", "llama.cpp (GGUF)"),
        ("rust_model.ot", "rust-bert"),
        ("saved_model.pb", "TensorFlow"),
    ],
)
def test_weights_for_other_programs_are_named(name: str, program: str, factory: str, directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / name)
    file = directory / name
    reported = f"{file} holds weights for {program}; PyTorch weights"
    assert refusal(file) == (
        f"{reported} (.safetensors, .pt, .pth, .bin) are expected. Convert it, or ask its owner for model.safetensors."
    )
    alone = f"{reported} are expected. Convert it, or ask its owner for model.safetensors."
    if file.suffix == ".gguf":  # such a file is read by itself, and this one holds something else
        alone = (
            f"{file} is not a GGUF file that transformers can read (GGUF magic invalid). Fetch it again, or give the "
        )
        alone += "model as a Hugging Face directory."
    for source, message in (
        (file, alone),
        (
            directory,
            f"{directory} has its weights for {program} only ({name}); model.safetensors is expected. Convert it, or "
            "ask its owner for PyTorch weights.",
        ),
    ):
        with pytest.raises(UnbackdoorError) as refused:
            load(source)
        assert str(refused.value) == message


# Hugging Face directories


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete directory with a small network of the project."""
    from unbackdoor import archs

    folder = tmp_path / "model"
    model = archs.build("resnet18", classes=["cat", "dog", "owl"], channels=3, image_size=16, width=2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    assert load(folder).model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    return folder


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def sharded(folder: Path, index: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replaced(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of the weights file; None removes one."""
    path = folder / "model.safetensors"
    content = {**load_file(path), **{name.replace("_", "."): tensor for name, tensor in tensors.items()}}
    kept = {name: tensor for name, tensor in content.items() if tensor is not None}
    path.unlink()
    save_file(kept, path, metadata={"format": "pt"})


DIRECTORY_REFUSALS: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda folder: (folder / "config.json").unlink(),
        "{folder} has no config.json. It must be a Hugging Face directory; for other models give `factory`.",
    ),
    (
        lambda folder: (folder / "config.json").write_text("{"),
        "{folder}/config.json is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)). Fetch it again.",
    ),
    (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "{folder}/config.json must hold a JSON object, got list. Fetch it again.",
    ),
    (
        lambda folder: (folder / "preprocessor_config.json").write_text("3"),
        "{folder}/preprocessor_config.json must hold a JSON object, got int. Fetch it again.",
    ),
    (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "{folder} has no preprocessor_config.json. Put that of the model that it came from there, or give `mean`, "
        "`std` and `image_size`.",
    ),
    (
        lambda folder: changed(folder, problem_type="regression"),
        "{folder} is a model for regression; only single-label classifiers are supported.",
    ),
    (
        lambda folder: changed(folder, problem_type="multi_label_classification"),
        "{folder} is a model for multi-label classification; only single-label classifiers are supported.",
    ),
    (
        lambda folder: changed(folder, _attn_implementation="somebody/fast-attention"),
        "{folder} asks to run the code somebody/fast-attention; it was not loaded. Remove it from config.json.",
    ),
    (
        lambda folder: changed(folder, attn_implementation={"": "sdpa", "text": "somebody/fast@v1:attend"}),
        "{folder} asks to run the code somebody/fast@v1:attend; it was not loaded. Remove it from config.json.",
    ),
    (
        lambda folder: changed(folder, vision_config={"experts_implementation": "somebody/experts"}),
        "{folder} asks to run the code somebody/experts; it was not loaded. Remove it from config.json.",
    ),
    (
        lambda folder: changed(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "{folder} is quantised (bitsandbytes), and such weights cannot be tuned or mixed. Give the model as it was "
        "before quantisation, in float32, float16 or bfloat16.",
    ),
    (
        lambda folder: changed(folder, text_config={"quantization_config": "anything"}),
        "{folder} is quantised (quantization_config), and such weights cannot be tuned or mixed. Give the model as it "
        "was before quantisation, in float32, float16 or bfloat16.",
    ),
    (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}'),
        "{folder} is an adapter, and its config names /elsewhere as its base, which is not fetched unasked. Give "
        "`base`: the directory or Hub name of that model.",
    ),
    (
        lambda folder: (folder / "model.safetensors").unlink(),
        "{folder} has no model.safetensors (nor pytorch_model.bin). Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {"weight_map": {"a": "model-00002-of-00002.safetensors"}}),
        "{folder} lists the shard model-00002-of-00002.safetensors, which is missing. Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {"weight_map": {"a": "../../passwords"}}),
        "{folder} lists the shard passwords, which is missing. Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {"weight_map": {"fc.scale": "model-00001-of-00002.safetensors"}}),
        "{folder} lists fc.scale in the shard model-00001-of-00002.safetensors, which lacks it. Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {"weight_map": {}}),
        "{folder}/model.safetensors.index.json does not say which file holds which tensor. Fetch it again.",
    ),
    (
        lambda folder: (folder / "config.json").write_text("{}"),
        "{folder}/config.json does not say which kind of model it is (model_type). Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {"weight_map": ["a"]}),
        "{folder}/model.safetensors.index.json does not say which file holds which tensor. Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {"weight_map": {"a": 7}}),
        "{folder}/model.safetensors.index.json does not say which file holds which tensor. Fetch it again.",
    ),
    (
        lambda folder: sharded(folder, {}),
        "{folder}/model.safetensors.index.json does not say which file holds which tensor. Fetch it again.",
    ),
    (
        lambda folder: replaced(folder, fc_bias=None),
        "{folder} does not fit SmallResNetForImageClassification: it lacks 1 tensor(s) (fc.bias). Check the "
        "architecture.",
    ),
    (
        lambda folder: replaced(folder, fc_scale=torch.ones(3)),
        "{folder} does not fit SmallResNetForImageClassification: it has 1 that it does not know (fc.scale). Check the "
        "architecture.",
    ),
    (
        lambda folder: replaced(folder, fc_weight=torch.ones(4, 16)),
        "{folder} does not fit SmallResNetForImageClassification: it has 1 of another shape (fc.weight is (4, 16), not "
        "(3, 16)). Check the architecture.",
    ),
    (
        lambda folder: replaced(folder, fc_bias=torch.tensor([0.0, float("nan"), 0.0])),
        "{folder} has values that are not finite in fc.bias; finite weights are expected. Fetch it again, or ask its "
        "owner for a working model.",
    ),
    (
        lambda folder: changed(folder, model_type="theirs", auto_map={"AutoConfig": "theirs.Config"}),
        "{folder} needs Python code of its own, which is not run. Pass `trust_remote_code=True` if you trust it.",
    ),
]


@pytest.mark.parametrize(("change", "message"), DIRECTORY_REFUSALS, ids=[entry[1][:60] for entry in DIRECTORY_REFUSALS])
def test_a_directory_that_is_not_right_is_refused(
    change: Callable[[Path], object], message: str, directory: Path
) -> None:
    change(directory)
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    assert str(refused.value) == message.format(folder=directory)


def test_a_config_may_say_that_it_is_not_quantised(directory: Path) -> None:
    before = load(directory).model.state_dict()
    changed(directory, quantization_config=None)
    after = load(directory).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert"},
        {"model_type": "no-such-type"},
        {"model_type": 5},
        {"width": "wide"},
        {"width": -3},
        {"depths": 7},
        {"id2label": {"zero": "cat"}},
        {"transformers_weights": "../elsewhere.safetensors"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_image_classifier_is_refused_in_one_sentence(
    fields: dict[str, Any], directory: Path
) -> None:
    changed(directory, **fields)
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    message = str(refused.value)
    assert message.startswith(f"{directory} is not an image classifier that transformers can load (")
    assert message.endswith("). Check its config.json.")
    assert "\n" not in message


@pytest.mark.parametrize("names", ["cat", ["cat", "dog"], {"0": ["cat"]}], ids=str)
def test_class_names_are_names_by_number(names: Any, directory: Path) -> None:
    changed(directory, id2label=names)
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    assert str(refused.value) == (
        f"{directory}/config.json must have id2label as names by number, got {names!r}. Fetch it again."
    )


def test_code_of_a_directory_is_not_run_unless_trusted(directory: Path) -> None:
    marker = directory / "written"
    changed(
        directory,
        model_type="theirs",
        auto_map={"AutoConfig": "theirs.Config", "AutoModelForImageClassification": "theirs.Net"},
    )
    (directory / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(UnbackdoorError, match="needs Python code of its own"):
        load(directory)
    assert not marker.exists()


def test_a_truncated_directory_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    assert str(refused.value) == (
        f"{path} ends early: its header promises {len(content):,} bytes, the file has {len(content) - 1000:,}. "
        "Fetch it again."
    )


def test_a_pickle_in_a_directory_is_not_run(directory: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "written", directory / "pytorch_model.bin"
    (directory / "model.safetensors").unlink()
    write_pickle("zip", marker, path)
    with pytest.raises(UnbackdoorError, match=f"is a pickle that asks to run {os.system.__module__}.system; it was"):
        load(directory)
    assert not marker.exists()


def test_a_directory_with_a_harmless_pickle_is_loaded(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    loaded = load(directory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_sharded_directory_is_loaded_and_each_shard_checked(directory: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load(directory).model.fc.weight, model.fc.weight)
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    with pytest.raises(UnbackdoorError, match=re.escape(f"{shards[-1]} ends early: its header promises ")):
        load(directory)


def pickled(folder: Path, content: Any) -> None:
    """Replace the weights of a directory by a pickle."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_wrapped_model_in_a_directory_is_loaded(
    prefix: str, wrapper: str | None, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = load_file(directory / "model.safetensors")
    renamed: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    if wrapper is None:
        (directory / "model.safetensors").unlink()
        save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        pickled(directory, {wrapper: renamed, "epoch": 3})
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        loaded = load(directory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert caplog.messages[-1] == f"{directory}: its tensors are read without {prefix} before their names."


def test_a_sharded_pickle_is_loaded_and_each_shard_checked(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(state)
    parts = {f"pytorch_model-0000{part + 1}-of-00002.bin": names[part::2] for part in range(2)}
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = load(directory).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    (directory / file).write_bytes(b"")
    with pytest.raises(UnbackdoorError, match=f"{file} is damaged or not a PyTorch weights file"):
        load(directory)
    (directory / file).unlink()
    with pytest.raises(UnbackdoorError, match=f"lists the shard {file}, which is missing. Fetch it again."):
        load(directory)


def test_a_folder_of_the_hubs_cache_is_named(directory: Path) -> None:
    cached = directory.parent / "models--somebody--classifier"
    revision = cached / "snapshots" / "0123abcd"
    revision.parent.mkdir(parents=True)
    directory.rename(revision)
    with pytest.raises(UnbackdoorError) as refused:
        load(cached)
    assert str(refused.value) == (
        f"{cached} is a folder of the Hub's cache, which keeps models under snapshots. Give one of them, such as "
        f"{revision}."
    )
    assert load(revision).model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_a_folder_in_the_folder_is_named(directory: Path) -> None:
    directory.rename(directory.parent / "inner")
    (directory / "__MACOSX").mkdir(parents=True)
    (directory.parent / "inner").rename(directory / "suspect")
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    assert (
        str(refused.value) == f"{directory} has no config.json, but {directory}/suspect holds a model. Give that one."
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.fp16.safetensors", "model.safetensors"),
        ("weights.pth", "pytorch_model.bin"),
        ("best.ckpt", "pytorch_model.bin"),
    ],
)
def test_weights_of_another_name_are_named(name: str, wanted: str, directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    assert str(refused.value) == (
        f"{directory} has no model.safetensors, but {name}. If it holds the model's weights, rename it to {wanted}."
    )


def test_an_adapter_without_a_config_is_named_as_one(directory: Path) -> None:
    """As peft saves it: the config is the base's."""
    (directory / "config.json").unlink()
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "bert"}')
    with pytest.raises(UnbackdoorError, match=r"is an adapter, and its config names bert as its base, .* Give `base`"):
        load(directory)
    with pytest.raises(UnbackdoorError, match=r"holds an adapter \(adapter_config\.json\), .* its base as `base`; in"):
        load_base(directory)


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "resnet18", "num_classes": 3, "num_features": 512, "pretrained_cfg": {"mean": [0.5] * 3}},
        {"architecture": "resnet18", "model_type": "timm_wrapper", "label_names": ["a", "b"]},
    ],
)
def test_a_directory_of_timm_is_named(config: dict, directory: Path) -> None:
    """As `timm.models.push_to_hf_hub` writes it, and transformers for the same model."""
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnbackdoorError) as refused:
        load(directory)
    assert str(refused.value) == (
        f"{directory} is a model of timm. Give its weights file as `source`, and `factory=FILE.py:FUNCTION` whose "
        "function returns timm.create_model('resnet18', num_classes=...)."
    )


def test_a_file_of_a_directory_is_named_as_one_of_it(directory: Path) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        load(directory / "model.safetensors")
    assert str(refused.value) == (
        f"{directory}/model.safetensors is one file of the model that config.json describes. Give their directory, "
        f"{directory}."
    )
    with pytest.raises(UnbackdoorError, match=r"config\.json is one file of the model that config\.json describes\."):
        load(directory / "config.json")


def test_what_a_browser_shows_is_no_hub_name() -> None:
    with pytest.raises(UnbackdoorError) as refused:
        load("https://huggingface.co/org/model/tree/main")
    assert str(refused.value) == (
        "https://huggingface.co/org/model/tree/main does not exist, and is not a valid Hub name. Give the Hub name, "
        "org/model."
    )


def test_what_the_hub_is_asked_for() -> None:
    """All that a directory holds but weights for other programs, code, pictures and the folders in it."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "bpe.codes", "source.spm"]
    wanted += ["sentencepiece.bpe.model", "chat_template.jinja", "LICENSE", "generation_config.json", "qwen.tiktoken"]
    others = ["tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model.gguf", "runs/a/events.out.tfevents.1"]
    others += ["modeling_theirs.py", "plot.png", "checkpoint-10/model.safetensors"]
    ignored = [*_UNWANTED, "*.py"]
    assert list(filter_repo_objects([*wanted, *others], ignore_patterns=ignored)) == wanted


def test_weights_without_an_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(weights(), path)
    with pytest.raises(UnbackdoorError) as refused:
        load(path)
    assert str(refused.value) == (
        f"{path} holds weights without an architecture. Give `factory=FILE.py:FUNCTION` that makes the module."
    )


@pytest.mark.parametrize("source", ["/no/such/model", "./model", "models/cifar/suspect", "suspect..safetensors"])
def test_a_path_that_does_not_exist_is_refused_at_once(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UnbackdoorError) as refused:
        load(source)
    assert str(refused.value) == f"{source} does not exist, and is not a valid Hub name. Check it."
    assert time.perf_counter() - start < 5  # the first import of huggingface_hub included


def test_a_hub_that_cannot_be_reached_is_said_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from huggingface_hub import HfApi

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known.\nand much more")

    monkeypatch.setattr(HfApi, "repo_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(UnbackdoorError) as refused:
        load("nobody/has-this-model")
    message = str(refused.value)
    assert message.startswith("nobody/has-this-model is neither a local directory nor a model that the Hub offers (")
    assert message.endswith("). Check the name; without a network, fetch the model elsewhere and give its directory.")
    assert "\n" not in message
    assert time.perf_counter() - start < 5
    assert huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT <= 10  # the longest wait for a Hub that does not answer


class TestWholeNumbers:
    """A quantised model without its scale would be read as another model."""

    WAY_OUT = (
        "in whole numbers, as quantised models do; floating-point weights are expected (float64, float32, float16, "
        "bfloat16). Take the model as it was before it was quantised."
    )

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_weights_for_a_factory(self, name: str, factory: str, tmp_path: Path) -> None:
        state = {key: (100 * part).to(torch.int8) if key == "1.weight" else part for key, part in weights().items()}
        (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
        with pytest.raises(UnbackdoorError) as refused:
            load(tmp_path / name, factory=factory)
        assert str(refused.value) == f"{tmp_path}/{name} holds 1.weight {self.WAY_OUT}"

    @pytest.mark.parametrize("pickled", [False, True])
    def test_weights_in_a_directory(self, pickled: bool, directory: Path) -> None:
        file = directory / "model.safetensors"
        state = {name: part.to(torch.int8) for name, part in load_file(file).items()}
        file.unlink()
        if pickled:
            torch.save(state, directory / "pytorch_model.bin")
        else:
            save_file(state, file)
        with pytest.raises(UnbackdoorError) as refused:
            load(directory)
        assert re.search(r" holds \S+\.weight " + re.escape(self.WAY_OUT), str(refused.value))


def test_a_folder_whose_name_is_not_in_utf8(factory: str, tmp_path: Path) -> None:
    folder = tmp_path / "gr\udcfcn"  # as Latin-1 has it
    folder.mkdir()
    (folder / "w.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(UnbackdoorError) as refused:
        load(folder / "w.safetensors", factory=factory)
    assert str(refused.value).endswith(" has a name that is not in UTF-8, which safetensors cannot open. Rename it.")
