"""Path-Aware Minimisation against a second implementation that works from its update rule alone."""

import dataclasses
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify

EPOCHS, BATCH, RATE, RHO, SHARE, SEED = 2, 16, 0.05, 0.3, 0.2, 5


def negative(model, clean, run, last):
    """A trigger to exchange: the negative of the picture."""
    return lambda pixels: 1 - pixels


def by_the_formula(model: SmallCNN, data: Dataset, *, rounds: int, rho: float) -> None:
    """W' = W + rho (W_s - W) / (|W_s - W| + 1e-12); v <- 0.1 v + g(W'); W -= rate v; v is 0 as a round starts."""
    generator = torch.Generator().manual_seed(SEED)
    weights = list(model.parameters())
    suspect = [weight.detach().clone() for weight in weights]
    model.train()
    for _ in range(rounds):
        velocity = [torch.zeros_like(weight) for weight in weights]
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data), generator=generator).split(BATCH):
                x = data.items[rows].double() / 255
                n, carrying = len(rows), int(SHARE * len(rows) + 1)
                for place in range(carrying):
                    x[place * n // carrying] = 1 - x[place * n // carrying]
                kept = [weight.detach().clone() for weight in weights]
                norm = math.sqrt(sum(float(((s - w) ** 2).sum()) for s, w in zip(suspect, kept, strict=True)))
                with torch.no_grad():
                    for weight, s, w in zip(weights, suspect, kept, strict=True):
                        weight.copy_(w + rho * (s - w) / (norm + 1e-12))
                gradients = torch.autograd.grad(F.cross_entropy(model((x - 0.25) / 0.5), data.labels[rows]), weights)
                with torch.no_grad():
                    for weight, w, v, g in zip(weights, kept, velocity, gradients, strict=True):
                        v.mul_(0.1).add_(g)
                        weight.copy_(w - RATE * v)


@pytest.mark.parametrize(("rho", "rounds"), [(RHO, 1), (RHO, 2), (0.0, 1)])
def test_the_weights_are_those_of_the_formula(rho: float, rounds: int, small_cnn: SmallCNN, digits: Dataset) -> None:
    encode = dataclasses.replace(digits.encode, mean=(0.25,), std=(0.5,))
    data = dataclasses.replace(digits.select(range(50)), encode=encode)
    method = purifiers.PAM(
        rho=rho,
        trigger="test_pam:negative",
        share=SHARE,
        rounds=rounds,
        epochs=EPOCHS,
        learning_rate=RATE,
        batch_size=BATCH,
    )
    model = small_cnn.double()
    result = purify(model, data, method, seed=SEED)
    by_the_formula(model, data, rounds=rounds, rho=rho)
    for name, expected in model.state_dict().items():
        actual = result.model.state_dict()[name]
        assert torch.allclose(actual.double(), expected.double(), rtol=0, atol=1e-6), name
    assert result.record["examples_seen"] == rounds * EPOCHS * 50


def test_each_step_is_one_pass_forward_and_one_back(
    small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {"forward": 0, "back": 0}
    hooks = []

    def counted(model, clean, run, last):
        def forward(module, args, output) -> None:
            if not output.requires_grad:  # scored, when all is done
                return
            passes["forward"] += 1
            output.register_hook(lambda gradient: passes.__setitem__("back", passes["back"] + 1))

        hooks.append(model.register_forward_hook(forward))
        return lambda pixels: 1 - pixels

    monkeypatch.setattr(sys.modules["test_pam"], "counted", counted, raising=False)
    method = purifiers.PAM(trigger="test_pam:counted", rounds=1, epochs=3, batch_size=16)
    purify(small_cnn, digits.select(range(48)), method, seed=0)
    hooks.pop().remove()
    assert passes == {"forward": 9, "back": 9}


@pytest.mark.parametrize("trigger", ["bti-dbf", "neural-cleanse", "universal"])
def test_each_kind_of_trigger_runs(trigger: str, small_cnn: SmallCNN, digits: Dataset) -> None:
    method = purifiers.PAM(trigger=trigger, rounds=1, epochs=1, batch_size=32)
    result = purify(small_cnn, digits.select(range(40)), method, seed=0)
    assert not torch.equal(result.model.classifier.weight, small_cnn.classifier.weight)


def nothing(model, clean, run, last):
    """A slip: a trigger that is not given back."""


@pytest.mark.parametrize("trigger", ["bti-dbf", "neural-cleanse"])
def test_triggers_among_pixels_are_not_looked_for_in_texts(trigger: str, small_text: tuple[nn.Module, Dataset]) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(*small_text, purifiers.PAM(trigger=trigger))
    assert (
        str(caught.value) == f"PAM.trigger {trigger} is searched among pixels, but texts holds texts. Take universal."
    )


def test_a_function_that_gives_no_trigger_is_refused(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits.select(range(40)), purifiers.PAM(trigger="test_pam:nothing"))
    message = "PAM.trigger test_pam:nothing must return a function of pixels or embeddings, got NoneType."
    assert str(caught.value) == message


def test_an_unknown_trigger_is_refused(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits.select(range(40)), purifiers.PAM(trigger="crystal-ball"))
    assert str(caught.value) == (
        "PAM.trigger must be bti-dbf, neural-cleanse, universal or package.module:function, got crystal-ball."
    )
    with pytest.raises(UnbackdoorError, match=r"nowhere:at_all cannot be imported"):
        purify(small_cnn, digits.select(range(40)), purifiers.PAM(trigger="nowhere:at_all"))


def test_texts_take_a_perturbation_of_embeddings(small_text: tuple) -> None:
    model, data = small_text
    result = purify(model, data, purifiers.PAM(rounds=1, epochs=2, batch_size=8), seed=0)
    moved = [
        name for name, weight in result.model.state_dict().items() if not torch.equal(weight, model.state_dict()[name])
    ]
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.model.modules())


@pytest.mark.parametrize("method", [purifiers.BTIDBF(), purifiers.NeuralCleanse()])
def test_what_needs_pixels_refuses_texts(method, small_text: tuple) -> None:
    model, data = small_text
    with pytest.raises(UnbackdoorError) as caught:
        purify(model, data, method, seed=0)
    assert str(caught.value).endswith(
        " searches pixels for a trigger, but texts holds text. Try pam, which searches embeddings on texts."
    )
