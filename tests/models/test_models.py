"""Any image model in, the same kind out: Hugging Face directories, a user's own module with a factory, and its head."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fixtures import SmallCNN
from pictures import write_pictures
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, evaluate, load, purifiers, purify, save
from unbackdoor._cli.app import main
from unbackdoor._models.calling import class_count, class_names, logits
from unbackdoor._models.factory import make
from unbackdoor._models.head import features, head_of
from unbackdoor._models.hooks import watching
from unbackdoor._models.saving import check_saved

QUICK = purifiers.FST(epochs=1, batch_size=8)
CLASSES = {0: "cat", 1: "dog", 2: "owl"}


def pictures(encode: ImageEncoder, count: int = 24, side: int = 32, classes: int = 3) -> Dataset:
    """Random colour pictures; nothing here depends on what is on them."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Dataset(items=items, labels=torch.arange(count) % classes, encode=encode, name="pictures")


# Hugging Face directories


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=CLASSES)
    return ResNetForImageClassification(config)


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, id2label=CLASSES))


def convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, id2label=CLASSES)
    return ConvNextForImageClassification(config)


def swin() -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(**sizes, image_size=32, patch_size=4, id2label=CLASSES))


ARCHITECTURES = [(resnet, "classifier.1"), (vit, "classifier"), (convnext, "classifier"), (swin, "classifier")]


@pytest.fixture
def directory(tmp_path: Path) -> Callable[[Any], Path]:
    """Saves a model with a processor for 32x32 colour pictures."""

    def saved(model: Any) -> Path:
        from transformers import ViTImageProcessorPil

        folder = tmp_path / "suspect"
        model.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder

    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("build", "name"), ARCHITECTURES)
def test_hugging_face_in_and_out(
    build: Callable[[], Any], name: str, dtype: torch.dtype, directory: Callable[[Any], Path], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    torch.manual_seed(0)
    source = directory(build().to(dtype))
    model, encode = load(source)
    assert class_names(model) == ("cat", "dog", "owl")
    assert encode.size == (32, 32)
    data = pictures(encode)

    result = purify(model, data, QUICK)
    assert result.record["head"] == name
    assert not torch.equal(result.model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight"))
    (tmp_path / "out").mkdir()
    save(result.model, tmp_path / "out", source=source, encode=encode)

    again, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert type(again) is type(model)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert again.config.id2label == CLASSES
    inputs = encode(data.items).to(dtype)
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs).logits, result.model.eval()(inputs).logits)
    processed = AutoImageProcessor.from_pretrained(tmp_path / "out")(data.items[0], return_tensors="pt").pixel_values
    torch.testing.assert_close(processed, encode(data.items[:1]))
    assert torch.equal(load(tmp_path / "out").model(inputs).logits, again(inputs).logits)
    assert evaluate(result.model, data).clean_accuracy.n == 24


def test_options_change_a_directorys_own_encoder(directory: Callable[[Any], Path], tmp_path: Path) -> None:
    source = directory(convnext())
    own = load(source).encode
    assert own == ImageEncoder(mean=(0.5,) * 3, std=(0.5,) * 3, size=(32, 32), channels=3)
    model, changed = load(source, image_size=24, mean=(0.1, 0.2, 0.3))
    assert changed == ImageEncoder(mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, size=(24, 24), channels=3)
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", source=source, encode=changed)
    assert load(tmp_path / "out").encode == changed  # without the options


def test_a_directory_without_processor_gets_one(directory: Callable[[Any], Path], tmp_path: Path) -> None:
    source = directory(vit())
    (source / "preprocessor_config.json").unlink()
    model, encode = load(source, mean=(0.4,), std=(0.3,), image_size=32)
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", source=source, encode=encode)
    data = pictures(encode)
    assert torch.equal(load(tmp_path / "out").encode(data.items), encode(data.items))


def test_options_stand_in_for_a_processor_that_is_not_known(directory: Callable[[Any], Path]) -> None:
    source = directory(vit())
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "SamImageProcessor"}')
    with pytest.raises(UnbackdoorError, match="asks for the processor SamImageProcessor"):
        load(source, mean=(0.4,), image_size=32)
    encode = load(source, mean=(0.4,), std=(0.3,), image_size=32).encode
    assert encode == ImageEncoder(mean=(0.4,), std=(0.3,), size=(32, 32), channels=3)


def test_saving_keeps_the_processor_and_leaves_records_behind(directory: Callable[[Any], Path], tmp_path: Path) -> None:
    source = directory(resnet())
    for file in ("record.json", "attack.json", "labels.txt", "notes.bin", "model.safetensors.index.json"):
        (source / file).write_text("{}")
    model, encode = load(source)
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", source=source, encode=encode)
    kept = {file.name for file in (tmp_path / "out").iterdir()}
    assert kept == {"config.json", "model.safetensors", "preprocessor_config.json", "labels.txt"}
    same = [(folder / "preprocessor_config.json").read_bytes() for folder in (source, tmp_path / "out")]
    assert same[0] == same[1]


@pytest.mark.parametrize("kind", ["module", "transformers"])
def test_saving_makes_the_folder_or_says_why_not(
    kind: str, small_cnn: SmallCNN, small_vit: nn.Module, tmp_path: Path
) -> None:
    model = small_cnn if kind == "module" else small_vit
    save(model, f"{tmp_path}/missing/folder/x")
    stored = load_file(tmp_path / "missing" / "folder" / "x" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items() if name in stored)
    assert len(stored) > 5
    (tmp_path / "file").write_text("mine")
    whole = tmp_path / "missing" / "folder" / "x"
    refused = {
        tmp_path / "file": f"save takes folder as a directory, got the file {tmp_path}/file. Give a new directory.",
        tmp_path / "file" / "x": f"{tmp_path}/file/x cannot be made (Not a directory). Give another `folder`.",
        None: "save takes folder as a path, got None. Give a new directory.",
        whole: f"{whole} is the source itself, which is not replaced. Give another `folder`.",
    }
    for folder, message in refused.items():
        with pytest.raises(UnbackdoorError) as caught:
            save(model, folder, source=whole)
        assert str(caught.value) == message
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UnbackdoorError, match="save takes model as a module, got str"):
        save("a model", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_is_named(small_cnn: SmallCNN, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UnbackdoorError, match=r"could not be written .*No space left on device.*Free some space"):
        save(small_cnn, tmp_path / "out")


def test_a_trusted_directorys_code_travels_with_the_model(directory: Callable[[Any], Path], tmp_path: Path) -> None:
    source = directory(resnet())
    (source / "theirs.py").write_text(
        "from transformers import ResNetConfig, ResNetForImageClassification\n"
        "class Config(ResNetConfig):\n    model_type = 'theirs'\n"
        "class Net(ResNetForImageClassification):\n    config_class = Config\n"
    )
    config = json.loads((source / "config.json").read_text())
    named = {"AutoConfig": "theirs.Config", "AutoModelForImageClassification": "theirs.Net"}
    (source / "config.json").write_text(json.dumps({**config, "model_type": "theirs", "auto_map": named}))
    model, encode = load(source, trust_remote_code=True)
    assert type(model).__name__ == "Net"
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", source=source, encode=encode)
    again = load(tmp_path / "out", trust_remote_code=True).model
    inputs = encode(pictures(encode).items)
    assert torch.equal(again(inputs).logits, model(inputs).logits)


def test_class_names_are_known_only_where_somebody_gave_them(small_cnn: SmallCNN) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    assert class_names(small_cnn) is None
    assert class_names(ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))) is None
    unsorted = {2: "owl", 0: "cat", 1: "dog", 10: "yak", 3: "a", 4: "b", 5: "c", 6: "d", 7: "e", 8: "f", 9: "g"}
    named = ResNetForImageClassification(ResNetConfig(**sizes, id2label=unsorted))
    assert class_names(named) == ("cat", "dog", "owl", "a", "b", "c", "d", "e", "f", "g", "yak")


# a user's own module, with a factory

NET = '''
from __future__ import annotations

from dataclasses import dataclass

import torch
from beside import CLASSES
from torch import nn


@dataclass
class Shape:
    """Needs its module to be known to Python."""

    width: int = 6


class Net(nn.Module):
    """A shared layer, tied weights, a buffer that is not saved, and weights that do not lie in a row."""

    def __init__(self):
        super().__init__()
        width = Shape().width
        self.stem = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)
        self.down.weight = self.up.weight
        self.alias = self.norm
        self.head = nn.Linear(width, CLASSES)
        self.head.weight = nn.Parameter(torch.randn(width, CLASSES).t())
        self.register_buffer("scale", torch.full((width,), 2.0), persistent=False)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().mean((2, 3)) * self.scale
        return self.head(self.down(self.up(x).relu()))


def make():
    return Net()


def make_half():
    return Net().half()


def make_bfloat():
    return Net().bfloat16()


def make_double():
    return Net().double()
'''


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


@pytest.fixture(autouse=True)
def no_neighbours_left() -> Any:
    yield
    sys.modules.pop("beside", None)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        ("make", torch.float32),
        ("make_half", torch.float16),
        ("make_bfloat", torch.bfloat16),
        ("make_double", torch.float64),
    ],
)
def test_a_factorys_module_in_and_out(function: str, dtype: torch.dtype, net: Path, tmp_path: Path) -> None:
    factory = f"{net}:{function}"
    torch.manual_seed(0)
    original = make(factory).eval()
    assert not original.head.weight.is_contiguous()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    model, encode = load(tmp_path / "weights.pt", factory=factory, mean=(0.5,), std=(0.25,))
    data = pictures(encode)
    inputs = encode(data.items).to(dtype)
    assert torch.equal(logits(model, inputs), logits(original, inputs))

    result = purify(model, data, QUICK)
    assert result.record["head"] == "head"
    assert result.model.down.weight is result.model.up.weight
    assert {tensor.dtype for name, tensor in result.model.named_buffers() if "tracked" not in name} == {dtype}
    (tmp_path / "out").mkdir()
    save(result.model, tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == original.state_dict().keys()
    assert {stored[name].dtype for name in stored if "tracked" not in name} == {dtype}
    assert torch.equal(stored["up.weight"], stored["down.weight"])
    again = make(factory)
    again.load_state_dict(stored)  # the user's own way
    for loaded in (again.eval(), load(tmp_path / "out", factory=factory).model):
        assert torch.equal(logits(loaded, inputs), logits(result.model.eval(), inputs))
    assert evaluate(result.model, data).clean_accuracy.n == 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alone", [True, False])
def test_a_file_in_half_precision_comes_out_in_it(dtype: torch.dtype, alone: bool, net: Path, tmp_path: Path) -> None:
    """Twice the size came out, and a server that casts nothing got another type than it had."""
    factory = f"{net}:make"
    torch.manual_seed(0)
    original = make(factory).eval()
    weights = {name: part.contiguous().clone() for name, part in original.state_dict().items()}
    halved = {name: part.to(dtype) for name, part in weights.items() if part.is_floating_point()}
    if alone:
        del halved["up.weight"]  # it shares its memory with another
    else:  # some in float32, as mixed precision leaves them
        halved["head.bias"] = weights["head.bias"]
    torch.save(weights | halved if not alone else halved, tmp_path / "weights.pt")
    model, encode = load(tmp_path / "weights.pt", factory=factory)
    data = pictures(encode)
    assert {part.dtype for part in model.parameters()} == {torch.float32}

    result = purify(model, data, QUICK, device="cpu")
    save(result.model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: halved.get(name, part).dtype for name, part in weights.items()}
    expected |= {"up.weight": dtype}
    assert {name: part.dtype for name, part in stored.items()} == expected
    check_saved(tmp_path / "out", result.model, encode, data, factory=factory)
    again = load(tmp_path / "out", factory=factory).model
    assert torch.equal(logits(again, encode(data.items)), logits(result.model.eval(), encode(data.items)))
    with torch.no_grad():
        result.model.down.weight[0, 0] = 1e5
    if dtype == torch.float16:
        with pytest.raises(UnbackdoorError, match=r"save got values in .* too large for float16, the type of the file"):
            save(result.model, tmp_path / "more")


def test_a_directory_remembers_how_its_pixels_were_encoded(net: Path, tmp_path: Path) -> None:
    factory = f"{net}:make"
    save_file({k: v.contiguous().clone() for k, v in make(factory).state_dict().items()}, tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors", factory=factory).encode == ImageEncoder(channels=3)  # its convolution's
    encode = load(tmp_path / "w.safetensors", factory=factory, mean=(0.1, 0.2, 0.3), std=(0.5,), image_size=24).encode
    assert encode == ImageEncoder(mean=(0.1, 0.2, 0.3), std=(0.5,), size=(24, 24), channels=3)

    clean = parquet(tmp_path)
    options = ["--factory", factory, "--mean", "0.1,0.2,0.3", "--std", "0.5", "--image-size", "24"]
    out = tmp_path / "out"
    command = ["purify", "fst", str(tmp_path / "w.safetensors"), "--clean", clean, "--out", str(out), "--epochs", "1"]
    assert run(*command, *options) == 0
    assert load(out, factory=factory).encode == encode
    assert load(out, factory=factory, mean=(0.7,)).encode.mean == (0.7,)
    assert run("evaluate", str(out), "--data", clean, "--factory", factory) == 0
    (out / "record.json").unlink()
    assert load(out, factory=factory).encode == ImageEncoder(channels=3)


CHANNELS = """
from torch import nn


def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def unclear():
    return nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


@pytest.mark.parametrize(("function", "channels"), [("grey", 1), ("colour", 3), ("unclear", None)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_get_the_channels_that_a_factorys_module_takes(
    function: str, channels: int | None, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "channels.py").write_text(CHANNELS)
    factory = f"{tmp_path}/channels.py:{function}"
    save_file(make(factory).state_dict(), tmp_path / "w.safetensors")
    for label in range(3):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        Image.new(mode, (8, 8)).save(tmp_path / "data" / str(label) / "0.png")
    encode = load(tmp_path / "w.safetensors", factory=factory).encode
    assert isinstance(encode, ImageEncoder)
    assert encode.channels == channels
    expected = channels or {"L": 1, "RGB": 3}[mode]
    assert Dataset.load(tmp_path / "data", encode).pixels.shape == (3, expected, 8, 8)


@pytest.mark.parametrize(
    "entry", [3, "x", {}, {"mean": [0.5]}, {"mean": [1, 2], "std": [1], "size": None, "channels": 3}]
)
def test_a_record_changed_by_hand_is_refused(entry: object, net: Path, tmp_path: Path) -> None:
    factory = f"{net}:make"
    save(make(factory), tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"encode": entry}))
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path, factory=factory)
    assert str(refused.value) == (
        f"{tmp_path}/record.json has an encode entry that unbackdoor did not write. Remove it, and give `mean`, `std` "
        "and `image_size`."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "`mean` must be 1 or 3 numbers, got 0.1,0.2."),
        ({"std": (0.1, 0.0, 0.1)}, "`std` must be 1 or 3 numbers above 0, got 0.1,0,0.1."),
        (
            {"mean": (123.7, 116.3, 103.5)},
            "`mean` is for pixels from 0 to 1, got 123.7,116.3,103.5. If it is for pixels from 0 to 255, divide it by "
            "255.",
        ),
        (
            {"mean": (0.0,), "std": (255.0,)},
            "`std` is for pixels from 0 to 1, got 255. If it is for pixels from 0 to 255, divide it by 255.",
        ),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0."),
        ({"factory": "net.py"}, "`factory` must be FILE.py:FUNCTION, got net.py."),
        (
            {"factory": "nowhere.py:make"},
            "`factory` names nowhere.py, which does not exist. Give FILE.py:FUNCTION, a file of yours.",
        ),
        ({"factory": "{folder}/net.txt:make"}, "`factory` names {folder}/net.txt, which is not a Python file."),
        (
            {"factory": "{folder}/net.py:build"},
            "{folder}/net.py has no function build. `factory` is FILE.py:FUNCTION.",
        ),
        (
            {"factory": "{folder}/net.py:Shape"},
            "{folder}/net.py:Shape must return a torch.nn.Module, got Shape.",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, net: Path, tmp_path: Path) -> None:
    (tmp_path / "net.txt").write_text("")
    if "factory" in options:
        options = {"factory": options["factory"].format(folder=tmp_path)}
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path / "w.safetensors", **options)
    assert str(refused.value) == message.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def make(:", "SyntaxError: invalid syntax"),
        ("def make(width): ...", "TypeError: make() missing 1 required positional argument: 'width'"),
    ],
    ids=["import", "syntax", "arguments"],
)
def test_a_factory_that_fails(program: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(program)
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path / "w.safetensors", factory=f"{file}:make")
    assert str(refused.value).startswith(f"`factory` {file}:make failed ({reason}")
    assert str(refused.value).endswith("). The function must make the module without arguments.")
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("module", "name"),
    [("nn.Sequential(nn.LazyConv2d(4, 3))", "0.weight"), ("nn.Linear(4, 2, device='meta')", "weight")],
    ids=["lazy", "meta"],
)
def test_a_factory_whose_module_has_no_numbers_yet(module: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(f"from torch import nn\ndef make():\n    return {module}\n")
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path / "w.safetensors", factory=f"{file}:make")
    assert str(refused.value) == (
        f"{file}:make returns a module whose {name} has no memory yet, as in a lazy layer or on the meta device. Give "
        "its layers their sizes, or call a lazy module once before you return it."
    )


def test_what_a_factory_prints_and_the_arguments_that_it_reads_are_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts of research parse their arguments and print their settings where the module is made."""
    (tmp_path / "net.py").write_text(
        "import argparse\nfrom torch import nn\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('--width', type=int, default=3)\n"
        "width = parser.parse_args().width\n"
        "def make():\n    print('a network of width', width)\n    return nn.Linear(width, 2)\n"
    )
    monkeypatch.setattr("sys.argv", ["unbackdoor", "evaluate", "--width", "7", "--json"])
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors", factory=f"{tmp_path}/net.py:make").model.in_features == 3
    assert capsys.readouterr() == ("", "a network of width 3\n")
    assert sys.argv[1:] == ["evaluate", "--width", "7", "--json"]


# the head


class Classifier(nn.Module):
    """Features, a last linear layer under a nested name, and what comes after it."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda scores: scores, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.inner = nn.ModuleDict({"neck": nn.Sequential(nn.Dropout(0.5), nn.Linear(4, outputs), nn.Dropout(0.5))})
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner["neck"](self.first(x.flatten(1)).relu()))


class Unused(Classifier):
    """A linear layer of the right shape runs after the head, but its answer goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        self.auxiliary(scores)
        return scores


def model_output(scores: Tensor) -> Any:
    from transformers.modeling_outputs import ImageClassifierOutput

    return ImageClassifierOutput(logits=scores)


INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "after",
    [
        lambda scores: scores,
        lambda scores: (scores, scores + 1),
        lambda scores: [scores],
        lambda scores: scores.log_softmax(1),
        lambda scores: F.dropout(scores, training=False),
        lambda scores: scores.clone().contiguous(),
        model_output,
    ],
)
def test_the_head_is_found_by_running(after: Callable[[Tensor], Any]) -> None:
    model = Classifier(after)
    found = head_of(model, INPUTS)
    assert found.name == "inner.neck.1"
    assert found.layer is model.inner["neck"][1]


def test_of_two_layers_of_one_shape_the_one_that_makes_the_logits_is_the_head() -> None:
    assert head_of(Classifier(), INPUTS).name == "inner.neck.1"  # first also has 4 outputs
    assert head_of(Unused(), INPUTS).name == "inner.neck.1"


class Several(nn.Module):
    """Features, scores of 3 classes, and what of them the model returns."""

    def __init__(self, returned: Callable[["Several", Tensor, Tensor], Any], width: int = 5) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, width), nn.Linear(width, 3)
        self.other, self.cosine = nn.Linear(width, 4), nn.Linear(width, 3, bias=False)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        seen = self.first(x)
        return self.returned(self, seen, self.fc(seen.relu()))


@pytest.mark.parametrize("width", [5, 3])
@pytest.mark.parametrize(
    "returned",
    [
        lambda _, seen, scores: (seen, scores),
        lambda _, seen, scores: (scores, seen),
        lambda _, seen, scores: [seen.relu(), scores, scores.softmax(1)],
        lambda _, seen, scores: (scores.softmax(1), scores),
        lambda _, seen, scores: (scores, scores * 2),
        lambda _, seen, scores: (seen[:, :, None, None], [seen], None, scores),
        lambda _, seen, scores: {"features": seen, "logits": scores},
        lambda _, seen, scores: {"features": seen, "prediction": scores},
        lambda _, seen, scores: OrderedDict(out=scores),
        lambda _, seen, scores: (torch.arange(len(seen))[:, None], scores),
    ],
)
def test_of_several_arrays_the_scores_are_found(returned: Callable[..., Any], width: int) -> None:
    torch.manual_seed(0)
    model = Several(returned, width).eval()
    model.first.weight.requires_grad_(False)
    expected = model.fc(model.first(INPUTS).relu())
    assert torch.equal(logits(model, INPUTS), expected)
    assert head_of(model, INPUTS).name == "fc"
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, *[True] * 6]
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_that_no_linear_layer_makes_are_what_the_features_lead_to() -> None:
    model = Several(lambda self, seen, _: (seen, F.normalize(seen) @ F.normalize(self.cosine.weight).T))
    assert logits(model, INPUTS).shape == (8, 3)


def test_where_two_arrays_could_be_the_scores_neither_is_taken() -> None:
    model = Several(lambda self, seen, scores: (scores, self.other(seen)))
    with pytest.raises(UnbackdoorError) as refused:
        logits(model, INPUTS)
    assert str(refused.value) == (
        "Several returns 2 arrays, of shapes (batch, 3) and (batch, 4), and it is unclear which of them is the class "
        "scores. Wrap it in a module that returns the class scores alone."
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_order_of_definition_does_not_matter() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4)
            self.first = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert head_of(Backwards(), INPUTS).name == "last"


def test_the_features_are_what_the_head_multiplies() -> None:
    model = Classifier().eval()
    found = head_of(model, INPUTS)
    seen = features(model, INPUTS, found)
    expected = seen @ found.layer.weight.T + found.layer.bias
    torch.testing.assert_close(logits(model, INPUTS), expected)


def test_watching_keeps_the_latest_pass_and_leaves_no_hook(small_cnn: SmallCNN, digits: Dataset) -> None:
    with watching(small_cnn.classifier) as seen:
        for rows in (slice(4), slice(4, 7)):
            scores = small_cnn(digits.encode(digits.items[rows]))
    assert torch.allclose(small_cnn.classifier(seen[0]), scores)
    assert len(seen) == 1
    assert not small_cnn.classifier._forward_pre_hooks


def test_a_head_may_be_named() -> None:
    assert head_of(Classifier(), INPUTS, "first").name == "first"
    assert head_of(Classifier(lambda scores: scores * 3), INPUTS, "inner.neck.1").name == "inner.neck.1"


NO_HEAD = (
    "Classifier has no final linear layer that makes its 4 logits. Name one with `head`, or end the "
    "model in an nn.Linear."
)


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (Classifier(lambda scores: scores * 3), None, NO_HEAD),
        (Classifier(lambda scores: scores.relu() + 1), None, NO_HEAD),
        (
            nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 3, 1), nn.Flatten()),
            None,
            "Sequential has no final linear layer that makes its 3 logits. Name one with `head`, or "
            "end the model in an nn.Linear.",
        ),
        (
            Classifier(lambda scores: scores / 0),
            None,
            "Classifier answers with values that are not finite, although its weights are. Check the buffers (a "
            "negative running_var, say) and the preprocessing.",
        ),
        (
            Classifier(lambda scores: scores.softmax(1)),
            None,
            "Classifier answers with probabilities; class scores (logits) are expected. Wrap it without its last "
            "activation.",
        ),
        (
            Classifier(lambda scores: scores.sigmoid()),
            None,
            "Classifier answers with probabilities; class scores (logits) are expected. Wrap it without its last "
            "activation.",
        ),
        (
            Classifier(outputs=1),
            None,
            "Classifier has one output; a classifier with at least 2 classes is expected (regression is not "
            "supported). If it tells two classes apart by a logit x, wrap it in a module that returns "
            "torch.cat([0 * x, x], dim=1).",
        ),
        (
            Classifier(),
            "fc",
            "`head` must name a linear layer of Classifier, got fc; its last ones are first, inner.neck.1.",
        ),
        (
            nn.Sequential(nn.Flatten()),
            "fc",
            "`head` must name a linear layer of Sequential, got fc; its last ones are none.",
        ),
        (
            Classifier(outputs=3),
            "first",
            "`head` first has 4 outputs, but Classifier answers with 3 classes. Name the layer that makes the logits.",
        ),
        (
            Classifier(lambda scores: BaseModelOutputWithPooling(pooler_output=scores)),  # a body without a head
            None,
            "Classifier must return class scores of shape (batch, classes), got BaseModelOutputWithPooling. Wrap it in "
            "a module that does.",
        ),
        (
            Classifier(lambda scores: {"loss": 0.5}),
            None,
            "Classifier must return class scores of shape (batch, classes), got dict. Wrap it in a module that does.",
        ),
        (
            Classifier(lambda scores: F.dropout(scores)),
            None,
            "Classifier answers the same inputs in another way each time; in eval mode, nothing may be drawn. Give "
            "F.dropout and the like training=self.training.",
        ),
        (
            Classifier(lambda scores: scores[:, :, None]),
            None,
            "Classifier must return class scores of shape (batch, classes), got shape (8, 4, 1). Wrap it in a module "
            "that does.",
        ),
        (
            nn.Linear(5, 3),
            None,
            "Linear cannot take inputs of shape (8, 6) (mat1 and mat2 shapes cannot be multiplied (8x6 and 5x3)). Take "
            "data of the size and the channels that it was trained on, or give `image_size`.",
        ),
        (
            Classifier(lambda scores: {}["width"]),
            None,
            "Classifier cannot take inputs of shape (8, 6) ('width'). Take data of the size and "
            "the channels that it was trained on, or give `image_size`.",
        ),
    ],
)
def test_a_head_that_cannot_be(model: nn.Module, name: str | None, message: str) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        head_of(model, INPUTS, name)
    assert str(refused.value) == message
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_answers_that_depend_on_the_batch_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    for _ in range(2):
        head_of(model, INPUTS)
    assert caplog.messages == [
        "Sequential: its answer to an example depends on the other examples of the batch (a BatchNorm that keeps no "
        "statistics, or counts in eval mode, does that, and a model that reads padding), and so do its scores."
    ]
    head_of(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).half(), INPUTS.half())
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_looking_for_the_head_leaves_no_trace(frozen: bool, small_cnn: SmallCNN, digits: Dataset) -> None:
    small_cnn.train()
    if frozen:
        small_cnn.features[1].eval()
    modes = [module.training for module in small_cnn.modules()]
    before = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    data = digits.select(range(8))
    found = head_of(small_cnn, data.encode(data.items))
    assert class_count(small_cnn, data) == 10
    evaluate(small_cnn, data)
    features(small_cnn, data.encode(data.items)[:0], found)
    assert [module.training for module in small_cnn.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small_cnn.modules())
    if frozen:  # features() runs the model as it is, so only a frozen BatchNorm keeps its statistics
        assert all(
            torch.equal(small_cnn.state_dict()[name], tensor) for name, tensor in before.items() if ".1." in name
        )


def test_purify_takes_a_named_head(small_cnn: SmallCNN, digits: Dataset) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_cnn

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).relu() / 2

    data = digits.select(range(50))
    with pytest.raises(UnbackdoorError, match="Name one with `head`"):
        purify(Scaled(), data, QUICK)
    assert purify(Scaled(), data, QUICK, head="net.classifier").record["head"] == "net.classifier"


# the command line


def run(*arguments: str) -> int:
    """Run the command line; its exit code. It takes over the logger, which is given back."""
    logger = logging.getLogger("unbackdoor")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    try:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
    finally:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    return int(ended.value.code or 0)


def parquet(folder: Path) -> str:
    """Twelve pictures of three classes in a parquet file."""
    return write_pictures(pictures(ImageEncoder(), count=12), folder / "clean.parquet")


@pytest.mark.parametrize("command", ["evaluate", "purify"])
@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "pickle", "shape", "nan", "config", "no such path", "wrong channels"]
)
def test_the_command_line_refuses_with_one_sentence_and_leaves_nothing(
    command: str,
    kind: str,
    net: Path,
    tmp_path: Path,
    directory: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    factory, model = f"{net}:make", tmp_path / "w.safetensors"
    state = {name: tensor.clone().contiguous() for name, tensor in make(factory).state_dict().items()}
    marker = tmp_path / "written"
    options = ["--factory", factory]
    if kind == "missing":
        expected = "does not exist"
    elif kind == "truncated":
        save_file(state, model)
        model.write_bytes(model.read_bytes()[:-3])
        expected = "ends early"
    elif kind == "pickle":
        import os

        class Payload:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {marker}",)

        model = tmp_path / "w.pt"
        torch.save({**state, "extra": Payload()}, model)
        expected = "is a pickle that asks to run"
    elif kind == "shape":
        save_file({**state, "head.bias": torch.zeros(7)}, model)
        expected = "has 1 of another shape (head.bias is (7,), not (3,))"
    elif kind == "nan":
        save_file({**state, "head.bias": torch.full((3,), torch.nan)}, model)
        expected = "not finite in head.bias"
    elif kind == "wrong channels":
        net.write_text(NET.replace("Conv2d(3,", "Conv2d(4,"))
        save_file({**state, "stem.weight": torch.zeros(6, 4, 3, 3)}, model)
        expected = "Net cannot take inputs of shape (8, 3, 32, 32)"
    else:
        options = []
        model = directory(resnet()) if kind == "config" else tmp_path / "nowhere"
        if kind == "config":
            (model / "config.json").write_text("{")
        expected = "is not valid JSON" if kind == "config" else "does not exist"
    clean = parquet(tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    if command == "evaluate":
        code = run("evaluate", str(model), "--data", clean, *options)
    else:
        code = run("purify", "fst", str(model), "--clean", clean, "--out", str(tmp_path / "out"), *options)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    sentences = [line for line in captured.err.splitlines() if not line.startswith(("note:", "warning:"))]
    assert len(sentences) == 1
    assert expected in sentences[0]
    assert "Traceback" not in captured.err
    assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before
    assert not marker.exists()


@pytest.mark.thorough
def test_a_fresh_process_says_no_more_than_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-type"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    command = [sys.executable, "-c", "from unbackdoor._cli.app import main; main()"]
    ended = subprocess.run(
        [*command, "evaluate", str(tmp_path / "model"), "--data", "x.parquet"], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith(f"{tmp_path}/model is not an image classifier that transformers can load (")


def test_a_factory_is_read_as_it_is_now_and_leaves_nothing_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    (tmp_path / "beside_the_factory.py").write_text("width = 3\n")
    for outputs in (4, 5):
        text = (
            f"import beside_the_factory as b\nfrom torch import nn\ndef make(): return nn.Linear(b.width, {outputs})\n"
        )
        (tmp_path / "net.py").write_text(text)
        os.utime(tmp_path / "net.py", (1_700_000_000, 1_700_000_000))
        assert make(f"{tmp_path / 'net.py'}:make").out_features == outputs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside_the_factory.py", "net.py"]
