"""Decoding pictures and augmenting batches of them. The encoder has test_encoder.py."""

import io
import json
import logging
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from unbackdoor import Dataset, ImageEncoder, UnbackdoorError
from unbackdoor._data.augmentation import Augmentation, augmentation

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(*cells: object, encode: ImageEncoder | None = None) -> np.ndarray:
    """As (n, channels, height, width)."""
    return (encode or ImageEncoder()).read({"image": cells}, "d.parquet", None)[0].numpy()


def refusal(*cells: object, encode: ImageEncoder | None = None) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        read(*cells, encode=encode)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_colour(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read(encoded(Image.fromarray(COLOUR), kind, **options))[0], COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_grey(kind: str) -> None:
    pixels = read(encoded(Image.fromarray(GREY), kind))[0]
    assert all(np.array_equal(channel, GREY) for channel in pixels)
    assert len(pixels) == 1


def test_black_and_white() -> None:
    bits = Image.fromarray(GREY > 127)
    assert np.array_equal(read(encoded(bits))[0, 0], (GREY > 127) * 255)


def test_palette_pictures_get_their_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.putpixel((1, 0), 1)
    assert read(encoded(image))[0].transpose(1, 2, 0).tolist() == [[[10, 20, 30], [200, 150, 100]]]


def test_transparent_pictures_stand_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for column, pixel in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (100, 0, 0, 51)]):
        image.putpixel((column, 0), pixel)
    # A fifth of (100, 0, 0) on four fifths of white: 224, 204, 204.
    expected = [[[10, 20, 30], [255, 255, 255], [224, 204, 204]]]
    assert read(encoded(image))[0].transpose(1, 2, 0).tolist() == expected
    grey = Image.new("LA", (2, 1))
    grey.putpixel((0, 0), (40, 255))
    assert read(encoded(grey)).tolist() == [[[[40, 255]]]]
    keyed = encoded(Image.fromarray(np.array([[0, 90]], dtype=np.uint8)), transparency=0)
    assert read(keyed).tolist() == [[[[255, 90]]]]


def noted(caplog: pytest.LogCaptureFixture, *cells: object) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.INFO, "unbackdoor")
    read(*cells)
    return caplog.messages


def test_what_decoding_changes_is_said_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    plain, bright = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    clear, opaque = plain.copy(), plain.copy()
    clear.putalpha(Image.fromarray(GREY))
    opaque.putalpha(255)
    wide = Image.fromarray(GREY.astype(np.uint16) * 256)
    white = "transparent parts, which became white."
    assert noted(caplog, encoded(clear), encoded(opaque), encoded(plain)) == [f"d.parquet: 1 of 3 images have {white}"]
    keyed = encoded(Image.fromarray(np.array([[0, 90]], dtype=np.uint8)), transparency=0)
    assert noted(caplog, keyed) == [f"d.parquet: 1 of 1 images have {white}"]
    assert noted(caplog, encoded(wide)) == [
        "d.parquet: 1 of 1 images have 16 bits per channel, of which the upper 8 are kept."
    ]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        both = encoded(plain, kind, save_all=True, append_images=[bright])
        assert noted(caplog, encoded(plain, kind), both) == [
            "d.parquet: 1 of 2 images have several frames, of which the first is taken."
        ], kind
        options = {"lossless": True} if kind == "WEBP" else {}
        first, second = (
            encoded(plain, kind, **options),
            encoded(plain, kind, save_all=True, append_images=[bright], **options),
        )
        assert np.array_equal(read(first), read(second)), kind
    assert noted(caplog, encoded(plain, "MPO", save_all=True, append_images=[bright])) == []  # a phone's preview
    assert noted(caplog, encoded(plain.convert("CMYK"), "JPEG")) == [
        "d.parquet: 1 of 1 images are in the colours of print (CMYK), converted to RGB without a profile."
    ]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind: str) -> None:
    wide = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert read(encoded(Image.fromarray(wide), kind)).tolist() == [[[[0, 0, 1, 128, 255]]]]


def test_a_pgm_has_the_range_that_its_header_names() -> None:
    wide = np.array([0, 255, 256, 32768, 65535], dtype=">u2")
    for most, stored in ((65535, wide), (4095, wide // 16)):
        read_as = read(b"P5 5 1 %d\n" % most + stored.astype(">u2").tobytes()).flatten().tolist()
        assert read_as == pytest.approx([0, 0, 1, 128, 255], abs=1)


def test_pixels_of_unknown_range_are_refused() -> None:
    floats = encoded(Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)), "TIFF")
    assert refusal(floats) == (
        "d.parquet has a picture in row 0 that cannot be decoded (pixels of mode F have no known range; 8 and 16 bits "
        "have). Repair or remove that row."
    )


def test_arrays_of_whole_numbers() -> None:
    assert np.array_equal(read(GREY.tolist())[0, 0], GREY)
    assert np.array_equal(read(COLOUR)[0], COLOUR.transpose(2, 0, 1))
    assert np.array_equal(read(COLOUR.transpose(2, 0, 1))[0], COLOUR.transpose(2, 0, 1))  # as torch has them
    assert np.array_equal(read(GREY[None])[0, 0], GREY)
    assert np.array_equal(read(GREY[:, :, None])[0, 0], GREY)
    for wrong in ([[0.5, 1.0]], [[0, 256]], [[-1, 0]], [], 5, COLOUR[:, :, :2].tolist(), np.zeros((5, 7, 6), int)):
        message = refusal(wrong)
        assert message.startswith("d.parquet has a picture in row 0 that cannot be decoded (")
        assert "an array must hold whole numbers from 0 to 255, in rows and columns" in message


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_pictures_as_datasets_does(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = encoded(Image.fromarray(COLOUR), "PNG", exif=exif)
    other = datasets.Image().decode_example({"bytes": stored, "path": None})
    assert np.array_equal(read(stored)[0].transpose(1, 2, 0), np.asarray(other))


def outcome(stored: bytes) -> str:
    try:
        read(stored)
    except UnbackdoorError as problem:
        # A damaged size may decode: into pictures of an absurd shape, or of more pixels than such a file can hold.
        expected = (
            "d.parquet has a picture in row 0 that cannot be decoded (",
            "d.parquet: Pictures of ",
            "d.parquet has pictures of ",
        )
        return "a sentence" if str(problem).startswith(expected) else str(problem)
    return "a picture"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_a_picture_or_a_sentence(kind: str) -> None:
    whole = encoded(Image.fromarray(COLOUR), kind)
    for length in range(0, len(whole), 3):
        assert outcome(whole[:length]) in ("a picture", "a sentence")


@settings(max_examples=100, deadline=None)
@example(place=32, byte=10, kind="TIFF")  # 655,365 rows: read, but no picture for a model
@given(place=st.integers(0, 200), byte=st.integers(0, 255), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]))
def test_a_damaged_byte_is_a_picture_or_a_sentence(place: int, byte: int, kind: str) -> None:
    damaged = bytearray(encoded(Image.fromarray(COLOUR), kind))
    damaged[place % len(damaged)] = byte
    assert outcome(bytes(damaged)) in ("a picture", "a sentence")


@pytest.mark.parametrize("limit", [30, 10])
def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    # Pillow warns from its limit on and refuses from twice as many pixels on; 35 pixels here.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = refusal(encoded(Image.fromarray(GREY)))
    assert "d.parquet has a picture in row 0 that cannot be decoded (Image size (35 pixels) exceeds limit of" in message


def test_grey_among_colour_and_for_a_colour_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    cells = [encoded(Image.fromarray(GREY)), encoded(Image.fromarray(COLOUR))]
    assert np.array_equal(read(*cells)[0], np.stack([GREY] * 3))
    assert caplog.messages == ["d.parquet: 1 of 2 images converted to colour, as others have 3 channels."]
    caplog.clear()
    assert read(cells[0], cells[0], encode=ImageEncoder(channels=3)).shape == (2, 3, 5, 7)
    assert caplog.messages == ["d.parquet: 2 of 2 images converted to colour, as the model takes 3 channels."]


def test_colour_for_a_grey_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    pixels = read(encoded(Image.fromarray(COLOUR)), encode=ImageEncoder(channels=1))
    # ITU-R 601 luma, as Pillow documents it.
    assert np.abs(pixels[0, 0] - COLOUR @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert caplog.messages == ["d.parquet: 1 of 1 images converted to grey, as the model takes 1 channel."]


def test_a_model_for_other_channels() -> None:
    assert refusal(encoded(Image.fromarray(GREY)), encode=ImageEncoder(channels=4)) == (
        "The model takes 4 channels; pictures have 1 or 3, so d.parquet does not fit. Take a model for pictures."
    )


def test_sizes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    five, four = encoded(Image.fromarray(GREY)), encoded(Image.fromarray(GREY[:4, :4]))
    assert read(five, four, five).shape == (3, 1, 5, 7)
    assert caplog.messages == ["d.parquet: 1 of 3 images resized to 7x5."]
    caplog.clear()
    assert read(five, encode=ImageEncoder(size=(8, 9))).shape == (1, 1, 5, 7)  # a trigger acts at this size
    assert caplog.messages == ["d.parquet: images of 7x5 are resized to the model's 9x8."]
    caplog.clear()
    assert read(five, four, encode=ImageEncoder(size=(8, 9))).shape == (2, 1, 8, 9)
    assert caplog.messages == [
        "d.parquet: 2 images of 2 sizes, each brought to 9x8 by the model's own steps when it is read."
    ]
    caplog.clear()
    assert read(five, encode=ImageEncoder(size=(5, 7))).shape == (1, 1, 5, 7)
    assert caplog.messages == []


# Augmentation.


def slowly(images: np.ndarray, augment: Augmentation, seed: int) -> np.ndarray:
    """Image by image, from the same draws: a row offset and a column offset each, then the mirror."""
    generator = torch.Generator().manual_seed(seed)
    padding, made = augment.padding, []
    rows = columns = [padding] * len(images)
    if padding:
        rows, columns = torch.randint(0, 2 * padding + 1, (2, len(images)), generator=generator).tolist()
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).tolist() if augment.flip else [False] * len(images)
    for image, row, column, mirror in zip(images, rows, columns, mirrored, strict=True):
        wide = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        cut = wide[:, row : row + image.shape[1], column : column + image.shape[2]]
        made.append(cut[:, :, ::-1] if mirror else cut)
    return np.stack(made)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (3, 32, 32)])
@pytest.mark.parametrize(
    "augment", [Augmentation(), Augmentation(padding=2, flip=False), Augmentation(padding=0), Augmentation.none()]
)
def test_augmentation_is_that_of_single_images(shape: tuple[int, int, int], augment: Augmentation) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, *shape), dtype=np.uint8)
    batch = torch.from_numpy(images.copy())
    made = augment(batch, torch.Generator().manual_seed(5))
    assert np.array_equal(made.numpy(), slowly(images, augment, 5))
    assert made.dtype == torch.uint8
    assert np.array_equal(batch.numpy(), images)
    if augment == Augmentation.none():
        assert torch.equal(made, batch)


def test_every_offset_and_side_is_as_likely() -> None:
    # One bright pixel in the middle of 5x5 shows the offset; a second right of it shows the side.
    images = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4], images[:, 0, 4, 5] = 2, 1
    made = Augmentation(padding=2, flip=True)(images, torch.Generator().manual_seed(0))[:, 0]
    _, rows, columns = (made == 2).nonzero(as_tuple=True)
    mirrored = made[torch.arange(20_000), rows, columns - 1] == 1
    offsets = torch.where(mirrored, 8 - columns, columns)
    counts = Counter(zip(rows.tolist(), offsets.tolist(), mirrored.tolist(), strict=True))
    assert set(counts) == {(row, column, side) for row in range(2, 7) for column in range(2, 7) for side in (0, 1)}
    assert max(abs(count - 400) for count in counts.values()) < 5 * 20  # five standard deviations of 400


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.mark.parametrize(
    ("classes", "flip"),
    [
        (CIFAR, True),
        (FASHION, True),
        (None, True),
        (("3D printer", "three-toed sloth", "four-poster", "leftover", "vitamin C"), True),
        (tuple("0123456789"), False),
        (("zero", "one", "two"), False),
        (("A", "B", "C"), False),
        (("speed_limit_20", "stop"), False),
        (("turn left ahead", "stop"), False),
        (("keep-right", "stop"), False),
    ],
)
def test_what_auto_takes_for_handed(classes: tuple[str, ...] | None, flip: bool) -> None:
    assert augmentation("auto", (3, 32, 32), classes) == Augmentation(padding=4, flip=flip)


def test_real_class_names(shared_data) -> None:
    for name, flip in (("cifar10", True), ("fashion_mnist", True), ("gtsrb", False), ("mnist", False)):
        file = shared_data / "vision" / name / "test.parquet"
        file = file if file.exists() else file.with_name("validation.parquet")
        classes = datasets.Dataset.from_parquet(str(file), keep_in_memory=True, streaming=False).features["label"].names
        assert augmentation("auto", (3, 32, 32), classes).flip == flip, name


def test_kinds_of_augmentation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    digits = (1, 8, 8)
    assert augmentation("flip", digits, ("0", "1")) == Augmentation(padding=1, flip=True)
    assert augmentation("crop", digits, CIFAR) == Augmentation(padding=1, flip=False)
    assert augmentation("none", digits, CIFAR) == Augmentation(padding=0, flip=False)
    assert caplog.messages == []
    assert augmentation("auto", digits, ("zebra", "0", "1")) == Augmentation(padding=1, flip=False)
    assert caplog.messages == ["The class '0' may look different in a mirror: no flips (`augment='flip'` does them)."]


@pytest.mark.parametrize(("side", "padding"), [(7, 0), (8, 1), (28, 3), (32, 4), (224, 4)])
def test_the_padding_follows_the_size(side: int, padding: int) -> None:
    assert augmentation("flip", (1, side, side + 3), None).padding == padding


def test_a_damaged_note_in_a_picture_that_can_be_read_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Exif data whose directory promises 500 entries and holds none."""
    broken = b"Exif\0\0II*\0\x08\0\0\0" + b"\xf4\x01" + b"\xff" * 20
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    assert read(encoded(image, "PNG", exif=broken)).shape == (1, 3, 8, 8)
    assert [str(each.message) for each in recwarn.list] == []


def test_columns_of_a_saved_data_set_lie_in_regular_files(tmp_path: Path) -> None:
    """Such a file may name any other: one that nobody writes to would be waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    for entry, message in (
        ({"filename": "../pipe"}, f"{saved}/../pipe must be a regular file, got a named pipe. Give the file itself."),
        (5, f"{saved}/state.json must name files of the data set, got 5."),
    ):
        (saved / "state.json").write_text(json.dumps({"_data_files": [entry]}))
        with pytest.raises(UnbackdoorError) as refused:
            Dataset.load(saved)
        assert str(refused.value) == message
