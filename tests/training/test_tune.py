"""The loop's hooks, and what methods that perturb inputs or weights share."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sights
from fixtures import SmallCNN
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, purify
from unbackdoor._data.texts import Tokens
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.hooks import statistics_kept
from unbackdoor._models.perturbation import perturbation_shape, perturbation_unit
from unbackdoor._tasks.image_text import IMAGE_TEXT
from unbackdoor._training.contrastive import frozen_text_tower
from unbackdoor._victims.training import train_victim
from unbackdoor.purifiers import FST, CleanCLIP, FineMixing, FineTuning


def tuned(model: nn.Module, data: Dataset, **options: Any) -> dict[str, Tensor]:
    """The weights after `run.tune` with some options; those that need the model are made from it."""

    def method(mine: nn.Module, clean: Dataset, run: Any) -> nn.Module:
        made = {name: option(mine, run) if name == "gradients" else option for name, option in options.items()}
        run.tune(mine, clean, **{"epochs": 2, "batch_size": 16, "learning_rate": 0.01, **made})
        return mine

    return purify(model, data, method, seed=3, device="cpu").model.state_dict()


def test_gradients_of_ones_own_take_the_place_of_the_loss(small_cnn: SmallCNN, digits: Dataset) -> None:
    def twice(model: nn.Module, run: Any) -> Any:
        def gradients(batch: Any) -> None:
            assert all(parameter.grad is None for parameter in model.parameters())
            for _ in range(2):
                (F.cross_entropy(run.scores(model, batch.inputs), batch.labels) / 2).backward()

        return gradients

    model = small_cnn.double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # two forward passes a step learn the statistics twice
    data = digits.select(range(40))
    usual, own = tuned(model, data), tuned(model, data, gradients=twice)
    for name in usual:
        if "num_batches" not in name:
            assert torch.allclose(usual[name], own[name], atol=1e-10), name


def test_before_each_pass_one_call(small_cnn: SmallCNN, digits: Dataset) -> None:
    calls: list[str] = []
    steps: dict[str, Any] = {
        "before_epoch": lambda: calls.append("pass"),
        "after_step": lambda: calls.append("step"),
    }
    tuned(small_cnn, digits.select(range(40)), **steps)
    assert calls == ["pass", "step", "step", "step"] * 2


def test_adamw_is_to_be_had_for_images(small_cnn: SmallCNN, digits: Dataset) -> None:
    """w <- w - r (0.01 w + m / (1 - 0.9^t) / (sqrt(v / (1 - 0.999^t)) + 1e-8)), r falling linearly to zero."""
    model, data = small_cnn.double(), digits.select(range(40))
    result = tuned(model, data, optimizer="adamw")
    generator, parameters = torch.Generator().manual_seed(3), list(model.parameters())
    first, second = ([torch.zeros_like(one) for one in parameters] for _ in range(2))
    model.train()
    for step, batch in enumerate(b for _ in range(2) for b in data.batches(16, generator=generator)):
        loss = F.cross_entropy(model(batch.inputs.double()), batch.labels)
        rate = 0.01 * (1 - step / 6)
        with torch.no_grad():
            for one, slope, m, v in zip(parameters, torch.autograd.grad(loss, parameters), first, second, strict=True):
                m.mul_(0.9).add_(0.1 * slope)
                v.mul_(0.999).add_(0.001 * slope**2)
                moment, square = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                one.sub_(rate * (0.01 * one + moment / (square.sqrt() + 1e-8)))
    for name, expected in model.state_dict().items():
        assert torch.allclose(result[name], expected, atol=1e-9), name


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_kept_and_the_answer_is_the_same(training: bool) -> None:
    layer = nn.BatchNorm2d(3).train(training)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 2
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with statistics_kept(layer):
        answer = layer(x)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(answer, layer(x))
    assert layer.track_running_stats
    assert (layer.num_batches_tracked.item() == 1) == training


def test_a_layer_without_statistics_stays_without() -> None:
    layer = nn.BatchNorm2d(3, track_running_stats=False)
    with statistics_kept(layer):
        pass
    assert not layer.track_running_stats


def test_the_unit_of_pixels_takes_black_to_white(digits: Dataset) -> None:
    data = dataclasses.replace(digits, encode=ImageEncoder(mean=(0.2,), std=(0.4,), channels=1))
    black, white = (data.encode(torch.full((1, 1, 2, 2), level, dtype=torch.uint8)) for level in (0, 255))
    assert torch.allclose(black + perturbation_unit(SmallCNN(), data), white, atol=1e-6)
    assert perturbation_shape(SmallCNN(), white) == (1, 1, 2, 2)


class Words(nn.Module):
    """Two words, [3, 0] and [0, 4], and no more of a model than its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def test_the_unit_of_words_is_their_root_mean_square_entry(digits: Dataset) -> None:
    class Text:
        modality = "text"

    assert perturbation_unit(Words(), Text()).item() == pytest.approx(math.sqrt(25 / 4))
    assert perturbation_shape(Words(), Tokens(input_ids=torch.zeros(3, 7, dtype=torch.int64))) == (3, 7, 2)


def test_a_model_that_does_not_show_its_words_is_refused() -> None:
    with pytest.raises(UnbackdoorError) as caught:
        perturbation_shape(nn.Linear(2, 2), Tokens(input_ids=torch.zeros(3, 7)))
    assert str(caught.value) == (
        "Linear must give its word embeddings (get_input_embeddings) as an nn.Embedding, got nothing: models that read "
        "characters, such as CANINE, and I-BERT are not supported. Take one that has such a layer, as BERT and most "
        "models of transformers."
    )


TUNED = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    "method", [FineTuning(**TUNED), FST(**TUNED), CleanCLIP(**TUNED), FineMixing(rho=0.5, **TUNED)], ids=str
)
def test_the_scale_of_the_cosines_stays_below_a_hundred(method: Any) -> None:
    model = sights.clip()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    more = {"base": sights.clip(seed=1)} if isinstance(method, FineMixing) else {}
    with torch.no_grad():
        more.get("base", model).logit_scale.fill_(6.0)
    purified = purify(model, sights.pairs(32), method, device="cpu", **more).model
    assert float(purified.logit_scale.detach().exp()) <= 100.001


@pytest.mark.parametrize("freeze_text", [False, True])
def test_the_scale_stays_below_a_hundred_in_training_and_is_left_if_it_is_not_trained(freeze_text: bool) -> None:
    model = sights.clip()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    data, arithmetic = sights.pairs(32), choose(model, "cpu")
    settings: dict[str, Any] = {**TUNED, "adaptive": True, "seed": 0, "arithmetic": arithmetic}
    model.logit_scale.requires_grad_(False)
    train_victim(model, data, loss=IMAGE_TEXT.loss, **settings)
    assert float(model.logit_scale) == 6.0
    model.logit_scale.requires_grad_(True)
    gradients = frozen_text_tower(model, data, arithmetic) if freeze_text else None
    train_victim(model, data, loss=IMAGE_TEXT.loss, gradients=gradients, **settings)
    assert float(model.logit_scale.detach().exp()) <= 100.001
