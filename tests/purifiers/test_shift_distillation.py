"""The project's variant of FST: its loss by hand, and the distortion that it looks through."""

from dataclasses import replace

import torch

from fixtures import SmallCNN
from unbackdoor import Dataset, purifiers, purify
from unbackdoor._data.augmentation import Augmentation


def test_without_the_teacher_it_is_fst_on_distorted_examples(small_cnn: SmallCNN, digits: Dataset) -> None:
    data = digits.select(range(60))
    settings = {"alpha": 0.3, "epochs": 2, "learning_rate": 0.02, "batch_size": 16}
    variant = purify(small_cnn, data, purifiers.ShiftDistillation(share=0, **settings), seed=0, precision="fp32").model
    fst = purify(small_cnn, data.distorted(), purifiers.FST(**settings), seed=0, precision="fp32").model
    for name, tensor in fst.state_dict().items():
        assert torch.allclose(variant.state_dict()[name].float(), tensor.float(), atol=1e-6), name


def test_a_teacher_that_agrees_leaves_no_distance(digits: Dataset) -> None:
    """With one linear layer the suspect's own answers are reachable: the answers must come close to them."""
    from torch import nn

    torch.manual_seed(0)
    suspect = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = replace(digits.select(range(400)), encode=replace(digits.encode, mean=(0.0,), std=(1.0,)))
    method = purifiers.ShiftDistillation(alpha=0, share=1, epochs=150, learning_rate=0.5)
    made = purify(suspect, data, method, seed=0).model
    inputs = data.encode(data.items)
    distance = torch.nn.functional.kl_div(
        made(inputs).log_softmax(1), suspect(inputs).softmax(1), reduction="batchmean"
    ).item()
    assert distance < 0.01


def test_distortion_is_seeded_and_keeps_shape_and_range() -> None:
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(padding=0, flip=False, distort=True)
    one, two = (augment(pixels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == pixels.shape
    assert one.min() >= 0
    assert one.max() <= 255
    assert not torch.equal(one, pixels.float())


def test_about_every_second_image_has_a_square_of_one_level() -> None:
    """On noise, equal neighbours hardly occur; a square of at least 2x2 equal pixels shows that one was painted."""
    pixels = torch.randint(60, 190, (400, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(padding=0, flip=False, distort=True)
    painted = augment(pixels, torch.Generator().manual_seed(2))
    equal = (painted[..., 1:, 1:] == painted[..., :-1, :-1]) & (painted[..., 1:, :-1] == painted[..., :-1, 1:])
    share = equal.sum(dim=(1, 2, 3)).ge(3).float().mean().item()
    assert 0.4 < share < 0.6
