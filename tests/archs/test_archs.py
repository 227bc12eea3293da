"""The project's own networks: their size by count, and that they are ordinary Hugging Face models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, archs, load, purifiers, purify, save

CLASSES = ["cat", "dog", "owl"]


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return archs.build(name, **{"classes": CLASSES, "channels": 3, "image_size": 32, "width": 4, **options})


def residual_parameters(width: int, channels: int, classes: int, preact: bool) -> int:
    """Weights of a ResNet-18 with a 3x3 stem, counted from its description.

    Four stages of two blocks of two 3x3 convolutions, widths w, 2w, 4w, 8w; stages 2 to 4 start with a 1x1 projection;
    each normalisation has two weights per channel.
    """
    total = 9 * channels * width
    if not preact:
        total += 2 * width  # of the stem
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        total += 9 * inputs * outputs + 3 * 9 * outputs * outputs
        total += 2 * (inputs + 3 * outputs if preact else 4 * outputs)
        if inputs != outputs:
            total += inputs * outputs + (0 if preact else 2 * outputs)
        inputs = outputs
    if preact:
        total += 2 * inputs  # before the pooling
    return total + inputs * classes + classes


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18"])
def test_the_number_of_weights_is_that_of_the_paper(name: str, channels: int, width: int) -> None:
    model = build(name, width=width, channels=channels)
    expected = residual_parameters(width, channels, 3, preact=name.startswith("preact"))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_full_width_is_the_cifar_resnet18_of_the_literature() -> None:
    model = build("resnet18", width=64, classes=[str(label) for label in range(10)])
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


def test_resnet18_computes_what_its_description_says() -> None:
    """A second implementation, from the weights alone, in evaluation mode."""
    model = build("resnet18").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and weights that would show a normalisation left out
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    state = model.state_dict()

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        each = {
            part: state[f"{key}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        }
        return (x - each["running_mean"]) / (each["running_var"] + 1e-5).sqrt() * each["weight"] + each["bias"]

    def convolve(x: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{key}.weight"]
        return torch.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    inputs = torch.randn(2, 3, 32, 32)
    x = norm(convolve(inputs, "conv1"), "bn1").relu()
    for stage in range(4):
        for block in range(2):
            key, stride = f"stages.{stage}.{block}", 2 if stage > 0 and block == 0 else 1
            out = norm(convolve(x, f"{key}.conv1", stride), f"{key}.bn1").relu()
            out = norm(convolve(out, f"{key}.conv2"), f"{key}.bn2")
            if stride == 2:
                x = norm(convolve(x, f"{key}.shortcut.0", 2), f"{key}.shortcut.1")
            x = (out + x).relu()
    assert x.shape == (2, 32, 4, 4)
    expected = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, expected)


def test_wrn16_is_wrn_16_1_at_width_16() -> None:
    # Convolutions 432, 9,216, 32,256 and 129,024; projections 512 and 2,048; 464 channels normalised; a head of 650.
    model = archs.build("wrn16", classes=list("0123456789"), channels=3, image_size=32, width=16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 175_066
    assert sum(isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in model.modules()) == 13


@pytest.mark.parametrize(("image_size", "patch", "patches"), [(32, 4, 64), (28, 4, 49), (30, 3, 100), (8, 1, 64)])
def test_the_patches_of_a_transformer_cover_the_image(image_size: int, patch: int, patches: int) -> None:
    model = build("vit", image_size=image_size)
    assert model.config.patch_size == patch
    assert model.vit.embeddings.position_embeddings.shape[1] == patches + 1  # and the class token
    image = torch.zeros(1, 3, image_size, image_size)
    corner = image.clone()
    corner[..., -1, -1] = 1.0
    assert not torch.equal(model(image).logits, model(corner).logits)


def test_a_side_that_no_patches_cover() -> None:
    with pytest.raises(UnbackdoorError) as refused:
        build("vit", image_size=23)
    assert str(refused.value) == (
        "`arch='vit'` needs images whose side patches divide into 4 to 20, got 23. Resize them, to 24 say, or take "
        "`arch='resnet18'`."
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 28, 32])
@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18", "wrn16", "vit"])
def test_each_network_takes_its_images(name: str, image_size: int, channels: int) -> None:
    model = build(name, image_size=image_size, channels=channels).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, image_size, image_size)).logits.shape == (2, 3)


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("preact-resnet18", "fc"), ("vit", "classifier")])
def test_saved_purified_and_loaded_by_transformers(name: str, head: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    encode = ImageEncoder(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), size=(32, 32), channels=3)
    items = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset(items=items, labels=torch.arange(24) % 3, encode=encode, name="pictures")
    (tmp_path / "victim").mkdir()
    save(build(name), tmp_path / "victim", encode=encode)
    model, read = load(tmp_path / "victim")
    assert read == encode
    result = purify(model, data, purifiers.FST(epochs=1, batch_size=8))
    assert result.record["head"] == head

    (tmp_path / "out").mkdir()
    save(result.model, tmp_path / "out", source=tmp_path / "victim", encode=read)
    archs.register()
    again, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert again.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    inputs = encode(items)
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs).logits, result.model.eval()(inputs).logits)
        loss = again(inputs, labels=data.labels).loss
        torch.testing.assert_close(loss, nn.functional.cross_entropy(again(inputs).logits, data.labels))


def test_registering_twice_changes_nothing() -> None:
    archs.register()
    first = transformers.AutoConfig.for_model("unbackdoor-resnet").__class__
    archs.register()
    assert transformers.AutoConfig.for_model("unbackdoor-resnet").__class__ is first


def test_a_seed_fixes_the_first_weights() -> None:
    first, second = build("resnet18").state_dict(), build("resnet18").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("resnet18", 0, "`width` must be at least 1, got 0."),
        (
            "resnet-18",
            4,
            "There is no architecture 'resnet-18'. Did you mean 'resnet18'? See unbackdoor list archs.",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, width: int, message: str) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        build(name, width=width)
    assert str(refused.value) == message
