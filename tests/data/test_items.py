"""The items of a data set: images that are a tensor, texts, and their common methods."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import toys
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.images import Images
from unbackdoor._data.items import Items
from unbackdoor._data.texts import Texts

PIXELS = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)


def images() -> Images:
    return Images(PIXELS.clone())


def test_a_data_set_takes_a_tensor_and_holds_images() -> None:
    data = Dataset(items=PIXELS, labels=torch.tensor([0, 1]))
    assert type(data.items) is Images
    assert type(data.pixels) is Tensor
    assert data.shape == (3, 4, 4)
    assert type(data.select([1]).items) is Images
    assert data.items.data_ptr() == PIXELS.data_ptr()  # nothing is copied


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_mask_selects_the_rows_for_which_it_is_true(kind: Any) -> None:
    """Taken as numbers, a mask was the rows 0 and 1, many times."""
    data = Dataset(items=torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels=torch.tensor([5, 6, 7, 8]))
    some = data.select(kind([False, True, False, True]))
    assert some.labels.tolist() == [6, 8]
    assert some.rows is not None
    assert some.rows.tolist() == [1, 3]
    assert data.select(kind([False] * 4)).labels.tolist() == []
    with pytest.raises(
        UnbackdoorError,
        match=r"^Dataset.select takes a mask with an entry for each of 4 rows, got one of shape",
    ):
        data.select(kind([True, False]))


def test_pixels_from_0_to_1_are_refused() -> None:
    """They were taken for nearly black pictures."""
    with pytest.raises(UnbackdoorError) as refusal:
        Dataset(items=torch.full((2, 3, 4, 4), 0.5), labels=torch.tensor([0, 1]))
    assert str(refusal.value) == (
        "Pixels must be numbers from 0 to 255, got torch.float32 of at most 0.5, which is nearly black. Give "
        "(255 * pixels).round().to(torch.uint8)."
    )


GREY = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    "labels",
    [[2, 0, 1], (2, 0, 1), np.array([2, 0, 1], dtype=np.uint8), torch.tensor([2, 0, 1], dtype=torch.int32)],
)
def test_labels_are_class_indices_of_any_whole_type(labels: Any) -> None:
    data = Dataset(items=GREY, labels=labels)
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "came"),
    [
        (torch.tensor([0.0, 1.0, 2.0]), "float32 of shape (3,)"),
        (torch.tensor([[0], [1], [2]]), "int64 of shape (3, 1)"),
        (torch.eye(3, dtype=torch.int64), "int64 of shape (3, 3)"),
        (torch.tensor([0, 1]), "int64 of shape (2,)"),
        (["cat", "dog", "cat"], "text of shape (3,)"),
        (np.array([0.5, 1, 2]), "float64 of shape (3,)"),
        (np.array([0, None, 2]), "objects of shape (3,)"),
        (None, "NoneType"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(labels: Any, came: str) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        Dataset(items=GREY, labels=labels, name="mine")
    assert str(refusal.value) == (
        f"Dataset.labels of mine must be class indices, one whole number for each of its 3 examples, got {came}. Give "
        "a tensor of type int64 and shape (3,)."
    )


def test_an_array_of_numpy_holds_images_too() -> None:
    data = Dataset(items=PIXELS.numpy(), labels=[0, 1])
    assert torch.equal(data.pixels, PIXELS)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [PIXELS],
            "Images must be a tensor of pixels, (n, channels, height, width), uint8, got list. Dataset.load reads",
        ),
        (
            PIXELS[:, 0],
            "Images must have the shape (n, channels, height, width), got (2, 4, 4). Add the channel of grey",
        ),
        (PIXELS > 40, "got torch.bool of at most 1, which is nearly black."),
        (PIXELS / 127.5 - 1, "got torch.float32 from -1 to -0.254902. Give them as uint8, before they are normalised"),
        (PIXELS.long() * 9, "Pixels must be numbers from 0 to 255, got torch.int64 from 0 to 855. Give them as uint8."),
        (PIXELS.long() - 1, "Pixels must be numbers from 0 to 255, got torch.int64 from -1 to 94. Give them as uint8."),
        (PIXELS.to(torch.complex64), "Pixels must be numbers from 0 to 255, got complex ones. Give them as uint8."),
    ],
)
def test_what_are_no_pixels(items: Any, message: str) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        Dataset(items=items, labels=torch.tensor([0, 1]))
    assert message in str(refusal.value)


def test_images_do_what_a_tensor_does() -> None:
    some = images()
    assert isinstance(some, Tensor)
    assert (some.shape, some.dtype) == (PIXELS.shape, torch.uint8)
    assert torch.equal(some.float() / 255, PIXELS.float() / 255)
    assert torch.equal(255 - some, 255 - PIXELS)
    assert torch.equal(torch.cat([some, some]), torch.cat([PIXELS, PIXELS]))
    assert torch.equal(some[1, :, :2], PIXELS[1, :, :2])
    assert np.array_equal(np.asarray(some), PIXELS.numpy())
    some[:, :, 0] = 9
    assert (some[:, :, 0] == 9).all()


@pytest.mark.parametrize(
    "computed",
    [lambda x: x.float(), lambda x: x + 1, lambda x: x[0], lambda x: F.pad(x, (1, 1)), lambda x: next(iter(x))],
    ids=["float", "add", "one", "pad", "iterate"],
)
def test_what_is_computed_from_images_is_a_plain_tensor(computed) -> None:
    assert type(computed(images())) is Tensor


@pytest.mark.parametrize("rows", [torch.tensor([1]), torch.tensor([False, True]), slice(1, 2)])
def test_some_of_the_images_are_images(rows) -> None:
    some = images()[rows]
    assert type(some) is Images
    assert torch.equal(some, PIXELS[1:])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda some: pickle.loads(pickle.dumps(some))])
def test_copies_of_images_are_images(copied) -> None:
    some = copied(images())
    assert type(some) is Images
    assert torch.equal(some, PIXELS)


def kinds() -> list[Items]:
    texts = [("a film",), ("the plot was dull",), ("good cast",), ("it",)]
    pictures = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Images(pictures), toys.dataset(texts, [0, 1, 1, 0]).texts]


@pytest.mark.parametrize("items", kinds(), ids=["images", "texts"])
def test_both_kinds_are_joined_replaced_and_compared(items: Items) -> None:
    first, rest = items[torch.tensor([0])], items[torch.tensor([1, 2, 3])]
    assert len(first.joined(rest)) == len(items) == items.shape[0] == 4
    assert first.joined(rest).identities() == items.identities()
    assert len(set(items.identities())) == 4
    swapped = items.replaced(torch.tensor([3, 0]), items[torch.tensor([0, 3])])
    names = items.identities()
    assert swapped.identities() == [names[3], names[1], names[2], names[0]]
    assert items.identities() == names  # these are left alone
    assert items.on("cpu").identities() == names


@pytest.mark.parametrize("items", kinds(), ids=["images", "texts"])
def test_the_order_of_batches_has_each_row_once(items: Items) -> None:
    for generator in (None, torch.Generator().manual_seed(1)):
        assert sorted(items.order(2, generator).tolist()) == [0, 1, 2, 3]


def test_only_images_are_augmented() -> None:
    pictures, texts = kinds()
    mirrored = pictures.augmented(Augmentation(padding=0, flip=True), torch.Generator().manual_seed(0))
    assert type(mirrored) is Images
    assert mirrored.identities() != pictures.identities()
    assert texts.augmented(Augmentation(), torch.Generator()) is texts


def test_texts_without_an_encoder_have_no_tokens() -> None:
    with pytest.raises(AssertionError, match="no encoder has seen these texts"):
        _ = Texts((("a film",),), ("text",)).tokens


def test_data_sets_are_joined_and_their_items_replaced() -> None:
    data = Dataset(items=PIXELS, labels=torch.tensor([0, 1]), augment=Augmentation())
    both = data.joined(data.select([1]))
    assert both.labels.tolist() == [0, 1, 1]
    assert torch.equal(both.pixels, PIXELS[[0, 1, 1]])
    assert both.augment == data.augment
    changed = data.replaced(torch.tensor([1]), 255 - PIXELS[1:])
    assert torch.equal(changed.pixels, torch.cat([PIXELS[:1], 255 - PIXELS[1:]]))
    assert changed.labels.tolist() == [0, 1]
