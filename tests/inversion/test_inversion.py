"""Inverted triggers: which rows get them, where they are put, and what a search leaves behind."""

import pytest
import torch
from torch import nn

from fixtures import SmallCNN
from toys import a_run
from unbackdoor import Dataset
from unbackdoor._inversion.generator import TriggerGenerator
from unbackdoor._inversion.masks import stamp
from unbackdoor._inversion.search import frozen, training_batches
from unbackdoor._inversion.triggers import encoded, in_pixels
from unbackdoor._inversion.universal_perturbation import universal_perturbation
from unbackdoor._inversion.unlearning import WithTrigger, triggered_rows
from unbackdoor._models.calling import logits
from unbackdoor._models.perturbation import perturbed_logits


@pytest.mark.parametrize(
    ("count", "share", "rows"),
    [(10, 0.2, [0, 3, 6]), (5, 0.0, [0]), (4, 1.0, [0, 1, 2, 3]), (1, 0.1, [0]), (128, 0.1, None)],
)
def test_int_share_n_plus_one_examples_carry(count: int, share: float, rows: list[int] | None) -> None:
    triggered = triggered_rows(count, share).tolist()
    assert len(set(triggered)) == min(int(share * count + 1), count)
    assert rows is None or triggered == rows


def test_pixels_are_those_of_the_data_and_encode_as_before(digits: Dataset) -> None:
    data = digits.select(range(20))
    pixels = next(in_pixels(data).batches(20)).inputs
    assert torch.allclose(pixels, data.items.float() / 255)
    assert torch.allclose(encoded(data, pixels, a_run()), data.encode(data.items).double(), atol=1e-6)


def test_stamps_take_turns() -> None:
    mask = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    pattern = torch.tensor([0.2, 1.0]).view(2, 1, 1, 1)
    stamped = stamp(mask, pattern)(torch.tensor([0.4, 0.4, 0.8]).view(3, 1, 1, 1)).flatten()
    assert stamped.tolist() == pytest.approx([0.2, 0.7, 0.2])


def test_the_share_of_a_batch_carries_the_trigger_before_encoding(small_cnn: SmallCNN, digits: Dataset) -> None:
    data, model, run = digits.select(range(10)), small_cnn.double(), a_run()
    with_trigger = WithTrigger(model, data, run, lambda pixels: 1 - pixels, 0.2).eval()
    pixels = data.items.clone()
    pixels[[0, 3, 6]] = 255 - pixels[[0, 3, 6]]
    expected = model(data.encode(pixels).double())
    assert torch.allclose(with_trigger(data.items.double() / 255), expected, atol=1e-5)


def test_texts_carry_it_on_their_embeddings(small_text: tuple[nn.Module, Dataset]) -> None:
    model, data = small_text
    tokens = next(data.batches(10)).inputs
    shift = torch.full((1, 1, 16), 0.5)
    scores = logits(WithTrigger(model, data, a_run(), lambda embedded: shift, 0.2), tokens)
    rows = [0, 3, 6]
    expected = logits(model, tokens).clone()
    expected[rows] = perturbed_logits(model, tokens, shift)[rows]
    assert torch.allclose(scores, expected, atol=1e-5)


def test_an_untrained_generator_changes_next_to_nothing_and_takes_any_size() -> None:
    generator = TriggerGenerator(3, 4, torch.Generator().manual_seed(0))
    for size in ((8, 8), (13, 7), (32, 32)):
        pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
        changed = generator(pixels)
        assert changed.shape == pixels.shape
        assert 0 < (changed - pixels).abs().max() < 0.1
        assert changed.min() >= 0
        assert changed.max() <= 1


def test_frozen_gives_everything_back(small_cnn: SmallCNN) -> None:
    small_cnn.train()
    small_cnn.classifier.bias.requires_grad_(False)
    with frozen(small_cnn):
        assert not any(weight.requires_grad for weight in small_cnn.parameters())
        assert not small_cnn.features.training
    assert small_cnn.features.training
    assert small_cnn.classifier.weight.requires_grad
    assert not small_cnn.classifier.bias.requires_grad


def test_batches_go_on_for_as_many_steps_as_asked(digits: Dataset) -> None:
    run = a_run()
    sizes = [len(batch.labels) for batch in training_batches(digits.select(range(25)), 10, 5, run)]
    assert sizes == [10, 10, 5, 10, 10]
    assert run.examples_seen == 45


def test_a_universal_perturbation_keeps_its_bound_and_drives_examples_off(small_cnn: SmallCNN, digits: Dataset) -> None:
    data, model, run = digits.select(range(64)), small_cnn.double(), a_run()
    perturbed = universal_perturbation(model, data, run, steps=30)
    pixels = data.items.double() / 255
    assert (perturbed(pixels) - pixels).abs().max() <= 0.2 + 1e-6
    loss = nn.functional.cross_entropy
    with torch.no_grad():
        before, after = (loss(model(encoded(data, part, run)), data.labels) for part in (pixels, perturbed(pixels)))
    assert after > before


def test_a_universal_perturbation_of_texts_is_as_long_as_a_word(small_text: tuple[nn.Module, Dataset]) -> None:
    model, data = small_text
    shift = universal_perturbation(model, data, a_run(), steps=3)(torch.zeros(()))
    assert shift.shape == (1, 1, 16)
    length = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    assert shift.norm().item() == pytest.approx(length, rel=1e-5)
