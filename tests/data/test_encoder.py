"""The encoder against the image processors of transformers itself, on random pictures of many shapes."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from unbackdoor import ImageEncoder, UnbackdoorError
from unbackdoor._data.image_processors import encoder_of, preprocessor_of

SHAPES = [(32, 32), (40, 56), (61, 33), (224, 224), (300, 200), (17, 250)]  # (height, width)

# (class in transformers, its options); every option that a config may leave out is left out in one of them.
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {}),
    ("ViTImageProcessor", {"size": {"height": 64, "width": 32}, "resample": 0}),
    ("ViTImageProcessor", {"size": 64, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}),
    ("ViTImageProcessor", {"do_resize": False}),
    ("ViTImageProcessor", {"size": [48, 64], "do_normalize": False}),
    ("ViTImageProcessor", {"size": 32, "do_rescale": False, "do_normalize": False}),
    ("ViTImageProcessor", {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": 0.5, "image_std": 1.0}),
    ("ConvNextImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {"size": 32, "crop_pct": 0.9, "resample": 2}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 400}}),
    ("DeiTImageProcessor", {}),
    ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 33, "width": 64}}),
    ("CLIPImageProcessor", {}),
    ("CLIPImageProcessor", {"size": 64, "crop_size": 56}),
    ("CLIPImageProcessor", {"do_resize": False, "crop_size": {"height": 64, "width": 51}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 73}, "crop_size": {"height": 64, "width": 64}}),
    ("BeitImageProcessor", {}),
    ("BeitImageProcessor", {"size": 64, "do_center_crop": True, "crop_size": 48}),
    ("EfficientNetImageProcessor", {}),
    ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False}),
    ("LevitImageProcessor", {}),
    ("MobileNetV1ImageProcessor", {}),
    ("MobileNetV2ImageProcessor", {}),
    ("MobileViTImageProcessor", {}),
    ("PerceiverImageProcessor", {}),
    ("PoolFormerImageProcessor", {}),
    ("PvtImageProcessor", {}),
    ("SegformerImageProcessor", {}),
    ("SiglipImageProcessor", {}),
    ("TextNetImageProcessor", {"size": 100}),
]

# A float's rounding, some hundred times; one of a pixel's 256 levels is a thousand times as much.
CLOSE = 2e-5


def spelled(name: str, options: dict[str, Any], kind: str) -> dict[str, Any]:
    """The three ways in which a preprocessor_config.json may name one processor."""
    import transformers

    if kind == "as saved":
        content: dict[str, Any] = json.loads(getattr(transformers, f"{name}Pil")(**options).to_json_string())
        return content
    if kind == "fast":
        return {"image_processor_type": f"{name}Fast", **options}
    return {"feature_extractor_type": name.replace("ImageProcessor", "FeatureExtractor"), **options}


@pytest.mark.parametrize("kind", ["as saved", "fast", "old"])
@pytest.mark.parametrize(("name", "options"), PROCESSORS, ids=str)
def test_same_pixels_as_transformers(name: str, options: dict[str, Any], kind: str) -> None:
    import transformers

    theirs = getattr(transformers, f"{name}Pil")(**options)
    encode = encoder_of(spelled(name, options, kind), 3, "preprocessor_config.json")
    shapes = SHAPES if kind == "as saved" else SHAPES[1:2]
    for height, width in shapes:
        random = np.random.default_rng(height * width)
        picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs(images=picture, return_tensors="pt", input_data_format="channels_last").pixel_values
        made = encode(torch.from_numpy(picture).permute(2, 0, 1)[None])
        assert made.shape == expected.shape
        assert ((made - expected).abs() <= CLOSE * (1 + expected.abs())).all()


def test_without_resizing_the_numbers_are_those_of_the_formula() -> None:
    encode = ImageEncoder(mean=(0.25, 0.5, 0.75), std=(0.5, 1.0, 2.0))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - 0.25) / 0.5, 0.2 - 0.5, (1 - 0.75) / 2]).view(1, 3, 1, 1)
    torch.testing.assert_close(encode(pixels), expected)


@pytest.mark.parametrize(
    "encode",
    [
        ImageEncoder(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        ImageEncoder(mean=(0.3,), std=(0.37,), channels=1),
        ImageEncoder(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), size=(20, 30), resample="nearest", channels=3),
        ImageEncoder(
            mean=(1.0, 1.0, 1.0),
            std=(1.0, 1.0, 1.0),
            shortest_edge=36,
            crop=(32, 30),
            resample="bicubic",
            channels=3,
            scale=1 / 127.5,
        ),
    ],
)
def test_an_encoder_survives_its_preprocessor_config(encode: ImageEncoder) -> None:
    from transformers import ViTImageProcessorPil

    written = preprocessor_of(encode)
    assert encoder_of(written, encode.channels, "preprocessor_config.json") == encode
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, encode.channels or 3), dtype=np.uint8)
    theirs = ViTImageProcessorPil(**{key: given for key, given in written.items() if key != "image_processor_type"})
    expected = theirs(images=picture, return_tensors="pt", input_data_format="channels_last").pixel_values
    made = encode(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert ((made - expected).abs() <= CLOSE * (1 + expected.abs())).all()


WAY_OUT = " Save one there that is known and does the same, or give `mean`, `std` and `image_size` instead."
KNOWN = (
    "Beit, Bit, Blip, ChineseCLIP, CLIP, ConvNext, DeiT, EfficientNet, Levit, MobileNetV1, MobileNetV2, MobileViT, "
    "Perceiver, PoolFormer, Pvt, RTDetr, Segformer, Siglip, TextNet, ViT."
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_processor_type": "SamImageProcessor"},
            "p.json asks for the processor SamImageProcessor, which is not known here; known are " + KNOWN + WAY_OUT,
        ),
        (
            {"size": 224},
            "p.json asks for the processor without a name, which is not known here; known are " + KNOWN + WAY_OUT,
        ),
        (
            {"image_processor_type": "Siglip2ImageProcessor"},  # makes patches, with a mask
            "p.json asks for the processor Siglip2ImageProcessor, which is not known here; known are "
            + KNOWN
            + WAY_OUT,
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "resample": 6},
            "p.json asks for the filter 6, which is not known here." + WAY_OUT,
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "resample": [2]},
            "p.json asks for the filter [2], which is not known here." + WAY_OUT,
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 50}},
            "p.json has a field that no ViTImageProcessor can have (a size of {'longest_edge': 50})." + WAY_OUT,
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 0}},
            "p.json has a field that no CLIPImageProcessor can have (a size of 0)." + WAY_OUT,
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]},
            "p.json has a field that no ViTImageProcessor can have (ImageEncoder.mean must be 1 or 3 numbers, got "
            "0.5,0.5.)." + WAY_OUT,
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "image_std": ["a"]},
            "p.json has a field that no ViTImageProcessor can have (could not convert string to float: 'a')." + WAY_OUT,
        ),
    ],
)
def test_a_processor_that_is_not_understood_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        encoder_of(fields, 3, "p.json")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, "ImageEncoder.mean must be 1 or 3 numbers, got 0.5,0.5."),
        ({"std": (1.0, 0.0, 1.0)}, "ImageEncoder.std must be 1 or 3 numbers above 0, got 1,0,1."),
        ({"mean": (float("nan"),)}, "ImageEncoder.mean must be 1 or 3 numbers, got nan."),
        ({"mean": (0.1, 0.2, 0.3), "channels": 1}, "ImageEncoder.mean must be 1 number, got 0.1,0.2,0.3."),
        (
            {"resample": "area"},
            "ImageEncoder.resample must be one of nearest, lanczos, bilinear, bicubic, box, hamming, got area.",
        ),
    ],
)
def test_an_encoder_is_checked_when_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ImageEncoder(**options)
    assert str(refused.value) == message
