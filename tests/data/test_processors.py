"""Pictures as a model gets them, against transformers' own processors, over all that these can do."""

import io
import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, load, save
from unbackdoor._data.geometry import Crop, CropShare, Resize, ResizeWithin, resized
from unbackdoor._data.image_processors import _OF_MODELS, _PROCESSORS, encoder_of, preprocessor_of
from unbackdoor._data.overlap import without

# An input is at most some hundred times a float's rounding away: transformers scales, shifts and divides in another
# order. A pixel that is off by one of its 256 levels would be off by a thousand times as much.
CLOSE = 2e-5

MODES = [
    *[("RGB", kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP")],
    *[("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG")],
    *[("P", "PNG"), ("P", "GIF"), ("1", "PNG")],
]
SIDES = (7, 16, 20, 31, 32, 33, 40, 48, 64)


def drawn_size(draw: random.Random, *kinds: str) -> Any:
    """A size in one of the ways in which a processor's file may spell it."""
    first, second = draw.choice(SIDES), draw.choice(SIDES)
    return {
        "number": first,
        "list": [first, second],
        "sides": {"height": first, "width": second},
        "edge": {"shortest_edge": first},
        "edges": {"shortest_edge": first, "longest_edge": draw.choice((20, 33, 50, 64, 80))},
        "bound": {"max_height": first, "max_width": second},
    }[draw.choice(kinds)]


def drawn_processor(draw: random.Random) -> dict[str, Any]:
    """The content of a preprocessor_config.json: any known processor, with any of its settings changed."""
    family = draw.choice(list(_PROCESSORS))
    content: dict[str, Any] = {"image_processor_type": f"{family}ImageProcessor{draw.choice(('', 'Fast', 'Pil'))}"}
    if draw.random() < 0.2:
        content = {"feature_extractor_type": f"{family}FeatureExtractor"}
    content["size"] = drawn_size(draw, "number", "list", "sides", "edge", "edges", "bound")
    switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_flip_channel_order")
    for name in (*switches, "rescale_offset", "include_top"):
        if draw.random() < 0.25:
            content[name] = draw.choice((True, True, False, None))
    if content.get("do_center_crop") or draw.random() < 0.6:
        content["crop_size"] = drawn_size(draw, "number", "list", "sides")
    changes: dict[str, tuple[Any, ...]] = {
        "resample": tuple(range(6)),
        "rescale_factor": (1 / 255, 1 / 127.5, 1.0),
        "image_mean": (0.4, [0.1, 0.2, 0.3], [0.485, 0.456, 0.406]),
        "image_std": (0.4, [0.1, 0.2, 0.3], [1, 1, 1]),
        "crop_pct": (0.875, 0.9, 0.95, 1.0),
        "size_divisor": (1, 8, 32),
    }
    if draw.random() < 0.1:
        content["default_to_square"] = draw.choice((True, False))
    content |= {name: draw.choice(choices) for name, choices in changes.items() if draw.random() < 0.4}
    if draw.random() < 0.1:
        content |= {"do_pad": True, "pad_size": draw.choice((None, {"height": 90, "width": 80}))}
    return content


def drawn_picture(draw: random.Random, size: tuple[int, int]) -> bytes:
    """A picture file of some (width, height): photos and noise, in the modes and formats that people have."""
    noise = np.random.default_rng(draw.randrange(2**32))
    mode, kind = draw.choice(MODES)
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = noise.integers(0, 256, (4, 4, bands), dtype=np.uint8)
    made = [Image.fromarray(coarse[:, :, band]).resize(size, Image.Resampling.BICUBIC) for band in range(bands)]
    if draw.random() < 0.5:
        made = [Image.fromarray(noise.integers(0, 256, size[::-1], dtype=np.uint8)) for _ in range(bands)]
    image = made[0].convert(mode) if bands == 1 else Image.merge(mode, made)
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def by_transformers(folder: Path, pictures: list[bytes], **options: Any) -> list[torch.Tensor]:
    """Inputs that a directory's processor of transformers makes, in colour as its own conversion gives it."""
    from transformers import AutoImageProcessor
    from transformers.image_transforms import convert_to_rgb

    theirs = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, **options)
    made = []
    for picture in pictures:
        colour = convert_to_rgb(Image.open(io.BytesIO(picture)), return_numpy=True)
        made.append(theirs(images=Image.fromarray(colour), return_tensors="pt").pixel_values.float()[0])
    return made


def compared(folder: Path, draw: random.Random) -> str:
    """Hold the inputs of a few pictures against transformers'; what came of it, in a word."""
    content = drawn_processor(draw)
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    shapes = [(draw.choice((3, 28, 33, 64, 120)), draw.choice((5, 17, 32, 61, 90))) for _ in range(3)]
    if draw.random() < 0.5 or content.get("pad_size"):  # padding comes last, too late to make shapes alike
        shapes = shapes[:1] * 3
    pictures = [drawn_picture(draw, shape) for shape in shapes]
    try:
        expected = by_transformers(folder, pictures)
    except Exception:  # settings that transformers cannot take either
        expected = []
    try:
        encode = encoder_of(content, 3, "p.json")
        pixels, remaining = encode.read({"image": pictures}, "d.parquet", None)
        made = remaining(pixels)
    except UnbackdoorError as refusal:
        several = len({tensor.shape for tensor in expected}) != 1  # no batch could hold them
        fails = "nothing left" if "leaves no pixel" in str(refusal) else f"{refusal} {content}"
        return "refused by both" if several else fails
    if not expected:
        return "taken by us alone"
    shapes_differ = len({tensor.shape for tensor in expected}) != 1
    assert not shapes_differ or not encode.steps, content
    if shapes_differ:  # nothing is resized for the model, so the data's most frequent size is taken, and said
        return "of several sizes"
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.shape == theirs.shape, content
        assert ((ours - theirs).abs() <= CLOSE * (1 + theirs.abs())).all(), content
    return "same"


def test_random_processors_and_pictures(tmp_path: Path) -> None:
    draw = random.Random(0)
    outcomes = []
    for case in range(200):
        folder = tmp_path / str(case)
        folder.mkdir()
        outcomes.append(compared(folder, draw))
    counts = {outcome: outcomes.count(outcome) for outcome in outcomes}
    assert set(counts) <= {"same", "refused by both", "taken by us alone", "of several sizes", "nothing left"}, counts
    assert counts["same"] >= 120, counts
    assert counts.get("taken by us alone", 0) <= 10, counts
    assert counts.get("nothing left", 0) <= 2, counts


def written(folder: Path, pictures: list[bytes]) -> Path:
    """A data set of these pictures: files next to a list of them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for row, picture in enumerate(pictures):
        (folder / f"{row}.picture").write_bytes(picture)
        rows.append(json.dumps({"image": f"{row}.picture", "label": 0}))
    file = folder / "data.jsonl"
    file.write_text("\n".join(rows))
    return file


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("model_type", [each for models in _OF_MODELS.values() for each in models.split()])
def test_the_kind_of_model_decides_where_no_processor_is_named(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    encode = encoder_of({"do_resize": False}, 3, "p.json", model_type=model_type)
    picture = stored(noise(40, 50))
    (expected,) = by_transformers(tmp_path, [picture])
    pixels, encode = encode.read({"image": [picture]}, "d.parquet", None)
    assert ((encode(pixels)[0] - expected).abs() <= CLOSE * (1 + expected.abs())).all()


def test_every_image_classifier_of_transformers_has_its_processor_or_is_known_to_have_none() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    known = {each for models in _OF_MODELS.values() for each in models.split()}
    without = {"dinov2_with_registers", "hgnet_v2"}  # transformers has no processor by their name either
    # Documents turned and padded, colours as clusters, patches with masks, language models, or torchvision alone.
    others = {"donut-swin", "imagegpt", "siglip2", "shieldgemma2", "pp_lcnet", "timm_wrapper"}
    assert set(CLASSIFIERS) - known - without <= others


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT for 16x16 with two classes, as transformers saves it, without a processor."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
    )
    folder: Path = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def with_processor(directory: Path, folder: Path, content: dict[str, Any], **more: dict[str, Any]) -> Path:
    """A copy of a model directory with a preprocessor_config.json, and further files by their stems."""
    shutil.copytree(directory, folder)
    for stem, fields in {"preprocessor_config": content, **more}.items():
        (folder / f"{stem}.json").write_text(json.dumps(fields, indent=1))
    return folder


def test_pictures_of_several_sizes_reach_the_model_one_by_one(directory: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    content = {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 16}
    suspect = with_processor(directory, tmp_path / "suspect", content)
    pictures = [stored(noise(*size, seed)) for seed, size in enumerate([(30, 50), (61, 33), (16, 16), (30, 50)])]
    encode = load(suspect).encode
    data = Dataset.load(written(tmp_path, pictures), encode)
    expected = torch.stack(by_transformers(suspect, pictures))
    inputs = next(data.batches(4)).inputs
    assert data.shape == (3, 16, 16)
    assert ((inputs - expected).abs() <= CLOSE * (1 + expected.abs())).all()
    assert caplog.messages == [
        f"{data.name}: 4 images of 3 sizes, each brought to 16x16 by the model's own steps when it is read."
    ]
    # And so do their copies, and those of the same encoder's next data set.
    again = Dataset.load(written(tmp_path, pictures[:1]), data.encode)
    assert again.shape == (3, 30, 50)
    assert torch.equal(next(again.batches(1)).inputs, inputs[:1])
    assert torch.equal(next(data.select([2, 0]).batches(2)).inputs, inputs[[2, 0]])


def test_pictures_that_stay_of_several_sizes_are_refused(tmp_path: Path) -> None:
    encode = encoder_of({"image_processor_type": "SiglipImageProcessor", "size": {"shortest_edge": 16}}, 3, "p.json")
    pictures = [stored(noise(30, 50)), stored(noise(50, 30))]
    with pytest.raises(UnbackdoorError) as refused:
        encode.read({"image": pictures}, "d.parquet", None)
    assert str(refused.value) == (
        "d.parquet has pictures of 2 sizes, and the model's processor does not bring them to one. Give `image_size`, "
        "or pictures of one size."
    )


def test_large_pictures_are_brought_to_the_model_when_they_are_read(monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    encode = ImageEncoder(shortest_edge=20, crop=(16, 16), resample="bicubic", channels=3)
    pictures = [stored(noise(30, 50, seed)) for seed in range(3)]
    small, remaining = encode.read({"image": pictures}, "d.parquet", None)
    assert small.shape == (3, 3, 30, 50)
    caplog.clear()
    monkeypatch.setattr("unbackdoor._data.images._LARGE", 30 * 50 - 1)
    large, done = encode.read({"image": pictures}, "d.parquet", None)
    assert large.shape == (3, 3, 16, 16)
    assert torch.equal(done(large), remaining(small))
    assert caplog.messages == ["d.parquet: images of 50x30 are brought to 16x16 when they are read, as they are large."]
    unbounded, _ = ImageEncoder().read({"image": pictures}, "d.parquet", None)
    assert unbounded.shape == (3, 3, 30, 50)  # a model without a size of its own


@pytest.mark.parametrize("family", ["Perceiver", "CLIP", "ViT", "ConvNext"])
def test_a_photo_of_a_phone(family: str, tmp_path: Path) -> None:
    content = {"image_processor_type": f"{family}ImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    photo = stored(noise(30, 40).resize((4000, 3000), Image.Resampling.BICUBIC), "JPEG")
    (expected,) = by_transformers(tmp_path, [photo])
    pixels, encode = encoder_of(content, 3, "p.json").read({"image": [photo]}, "d.parquet", None)
    assert pixels.shape[-2:] == expected.shape[-2:]
    assert ((encode(pixels)[0] - expected).abs() <= CLOSE * (1 + expected.abs())).all()


def test_pictures_of_a_data_set_of_several_sizes_are_found_again_in_one_of_one_size(tmp_path: Path) -> None:
    encode = ImageEncoder(shortest_edge=20, crop=(16, 16), channels=3)
    first, second, third = (stored(noise(*size)) for size in ((30, 50), (50, 30), (30, 40)))
    other = stored(noise(30, 50, seed=7))
    clean = Dataset.load(written(tmp_path / "clean", [first, second, third]), encode)
    test = Dataset.load(written(tmp_path / "test", [other, first]), encode)
    assert without(test, clean).rows.tolist() == [0]
    assert without(test, clean).shape == (3, 30, 50)
    assert without(clean, test).rows.tolist() == [1, 2]


def test_another_model_sees_such_data_only_by_the_same_steps(tmp_path: Path) -> None:
    first = ImageEncoder(size=(16, 16), mean=(0.5,), channels=3)
    data = Dataset.load(written(tmp_path, [stored(noise(30, 50)), stored(noise(50, 30))]), first)
    other = data.encoded_by(ImageEncoder(size=(16, 16), std=(0.5,), channels=3))
    assert torch.allclose(next(other.batches(2)).inputs, 2 * (next(data.batches(2)).inputs + 0.5), atol=1e-6)
    with pytest.raises(UnbackdoorError) as refused:
        data.encoded_by(ImageEncoder(size=(20, 20), channels=3))
    assert str(refused.value) == (
        f"{data.name} has pictures of several sizes, or of more than a million pixels, and the two models that are to "
        "see them resize and crop pictures in different ways. Give small pictures of one size."
    )
    plain = Dataset.load(written(tmp_path, [stored(noise(30, 50))]), first)
    assert next(plain.encoded_by(ImageEncoder(size=(20, 20), channels=3)).batches(1)).inputs.shape == (1, 3, 20, 20)


PERCEIVER = {"image_processor_type": "PerceiverImageProcessor", "size": 16, "crop_size": 18}


def test_a_directory_keeps_its_own_processor_byte_by_byte(directory: Path, tmp_path: Path) -> None:
    nested = {"image_processor": PERCEIVER, "processor_class": "CLIPProcessor"}
    for number, files in enumerate(({}, {"processor_config": nested})):
        content = {"image_processor_type": "ViTImageProcessor", "size": 16, "unknown": [1, 2.50]}
        suspect = with_processor(directory, tmp_path / f"suspect{number}", content if files else PERCEIVER, **files)
        model, encode = load(suspect)
        assert encode.geometry == (CropShare((16 / 18, 16 / 18)), Resize((16, 16)))  # the nested one goes first
        picture = stored(noise(30, 50))
        (expected,) = by_transformers(suspect, [picture])
        pixels, remaining = encode.read({"image": [picture]}, "d.parquet", None)
        assert ((remaining(pixels)[0] - expected).abs() <= CLOSE * (1 + expected.abs())).all()
        out = tmp_path / f"out{number}"
        out.mkdir()
        save(model, out, source=suspect, encode=encode)
        for name in ("preprocessor_config", *files):
            assert (out / f"{name}.json").read_bytes() == (suspect / f"{name}.json").read_bytes()


def test_other_settings_of_the_user_are_what_comes_out(directory: Path, tmp_path: Path) -> None:
    content = {"image_processor_type": "LevitImageProcessor", "size": 16, "crop_size": 16}
    suspect = with_processor(directory, tmp_path / "suspect", content, processor_config={"image_processor": content})
    model, encode = load(suspect, mean=(0.1, 0.2, 0.3))
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, source=suspect, encode=encode)
    picture = stored(noise(30, 50))
    (expected,) = by_transformers(out, [picture])
    pixels, encode = encode.read({"image": [picture]}, "d.parquet", None)
    assert ((encode(pixels)[0] - expected).abs() <= CLOSE * (1 + expected.abs())).all()
    assert load(out).encode == replace(encode, done=False)


def test_a_processor_with_steps_of_its_own_takes_no_other_numbers(directory: Path, tmp_path: Path) -> None:
    mobile = {"image_processor_type": "MobileViTImageProcessor", "size": 16, "crop_size": 16}
    padded = {"image_processor_type": "ViTImageProcessor", "size": 8, "do_pad": True, "pad_size": 16}
    for name, content in (("perceiver", PERCEIVER), ("mobile", mobile), ("padded", padded)):
        suspect = with_processor(directory, tmp_path / name, content)
        with pytest.raises(UnbackdoorError) as refused:
            load(suspect, mean=(0.5,))
        assert str(refused.value) == (
            f"{suspect} has a processor with special steps, which cannot be combined with another `mean`, `std` or "
            "`image_size`. Leave these out."
        )
    assert load(tmp_path / "perceiver", image_size=16).encode.geometry is None
    with pytest.raises(UnbackdoorError) as refused:
        preprocessor_of(load(tmp_path / "perceiver").encode)
    assert str(refused.value) == (
        "The model's processor has steps of its own, which cannot be written again. Give save the directory that it "
        "came with (`source`), and leave `mean`, `std` and `image_size` out."
    )


def test_a_nested_processor_without_fields(directory: Path, tmp_path: Path) -> None:
    suspect = with_processor(directory, tmp_path / "suspect", {}, processor_config={"image_processor": "ViT"})
    with pytest.raises(UnbackdoorError) as refused:
        load(suspect)
    assert str(refused.value) == (
        f"{suspect}/processor_config.json has an image_processor without fields. Put that of the model that it came "
        "from there, or give `mean`, `std` and `image_size`."
    )


def test_a_processor_of_code_of_its_own(directory: Path, tmp_path: Path) -> None:
    own = {"auto_map": {"AutoImageProcessor": "processing.Own"}, "size": 16}
    suspect = with_processor(directory, tmp_path / "suspect", own)
    picture = stored(noise(30, 50))
    pixels, encode = load(suspect).encode.read({"image": [picture]}, "d.parquet", None)
    (expected,) = by_transformers(suspect, [picture], trust_remote_code=False)  # which takes the model's own kind then
    assert ((encode(pixels)[0] - expected).abs() <= CLOSE * (1 + expected.abs())).all()
    with pytest.raises(UnbackdoorError) as refused:
        load(suspect, trust_remote_code=True)
    assert str(refused.value).startswith(
        f"{suspect}/preprocessor_config.json asks for a processor with Python code of its own, which is not run for "
        "images. Save one of transformers there that does the same, or give `mean`, "
    )
    given = load(suspect, trust_remote_code=True, mean=(0.5,), std=(0.5,), image_size=16).encode
    assert given == ImageEncoder(mean=(0.5,), std=(0.5,), size=(16, 16), channels=3)


def test_padding_that_is_too_small() -> None:
    content = {"image_processor_type": "ViTImageProcessor", "size": 16, "do_pad": True, "pad_size": 15}
    with pytest.raises(UnbackdoorError) as refused:
        encoder_of(content, 3, "p.json").read({"image": [stored(noise(30, 50))]}, "d.parquet", None)
    assert str(refused.value) == (
        "d.parquet: The model's processor pads pictures to 15x15, but has them at 16x16 before. Give `image_size`."
    )


def test_pictures_of_which_nothing_is_left() -> None:
    encode = ImageEncoder(geometry=(ResizeWithin((16, 16)), Crop((16, 16))), channels=3)
    with pytest.raises(UnbackdoorError) as refused:
        encode.read({"image": [stored(noise(30, 50)), stored(noise(1, 40))]}, "d.parquet", None)
    assert str(refused.value) == (
        "d.parquet: The model's processor leaves no pixel of pictures of 40x1. Give `image_size`."
    )


@pytest.mark.parametrize("resample", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(11, 64), (70, 20), (12, 13), (80, 90), (40, 33)])
def test_floats_are_resized_as_whole_numbers_are_but_for_rounding(resample: Any, size: tuple[int, int]) -> None:
    smooth = noise(5, 5).resize((33, 40), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(smooth).copy()).permute(2, 0, 1)[None]
    floats = pixels.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = resized(floats, size, resample)
    exact = torch.from_numpy(np.asarray(smooth.resize(size[::-1], Image.Resampling[resample.upper()])).copy())
    assert torch.equal(resized(pixels, size, resample)[0].permute(1, 2, 0), exact)
    # Pillow rounds to 8 bits and cuts off at 0 and 255 after rows and again after columns.
    assert (made.detach().clamp(0, 255)[0].permute(1, 2, 0) - exact).abs().max() < 1.6
    made.sum().backward()
    assert floats.grad is not None
    assert floats.grad.isfinite().all()


def test_threads_change_no_pixel() -> None:
    pixels = torch.from_numpy(np.asarray(noise(40, 33)).copy()).permute(2, 0, 1)[None].repeat(5, 1, 1, 1)
    alone = resized(pixels, (20, 50), "lanczos")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(resized(pixels, (20, 50), "lanczos"), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_switch_that_is_neither_on_nor_off() -> None:
    content = {"image_processor_type": "ViTImageProcessor", "size": 16, "do_resize": "false"}
    with pytest.raises(UnbackdoorError) as refused:
        encoder_of(content, 3, "p.json")
    assert str(refused.value) == (
        "p.json must have do_resize as true or false, got 'false'. Save one there that is known and does the same, or "
        "give `mean`, `std` and `image_size` instead."
    )
