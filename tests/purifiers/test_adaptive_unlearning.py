"""Adaptive unlearning: on a network with a known backdoor, by its formula, and where there is nothing to unlearn."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._inversion.triggers import in_pixels
from unbackdoor.purifiers import adaptive_unlearning


def test_a_planted_trigger_is_unlearned_and_accuracy_stays(backdoored: tuple, digits: Dataset) -> None:
    model, stamped, test = backdoored
    result = purify(model, digits.select(range(300)), purifiers.AdaptiveUnlearning(), seed=0, device="cpu")
    (note,) = [each for each in result.record["notes"] if each.startswith("triggers that are unlearned: ")]
    assert "a patch to 3" in note
    labels = digits.labels[1000:1400]
    with torch.no_grad():
        before, after = ((each(test).argmax(1) == labels).double().mean() for each in (model, result.model))
        assert (model(stamped).argmax(1) == 3).double().mean() > 0.9
        assert (result.model(stamped).argmax(1) == 3).double().mean() < 0.1
    assert after > before - 0.03


class Negative:
    """A trigger that is known: the negative of the picture. It counts its steps."""

    kind, target = "patch", 3

    def __init__(self) -> None:
        self.steps = 0

    def step_(self, model: nn.Module, pixels: torch.Tensor, clean: Dataset, run: object) -> None:
        self.steps += 1

    def shown(self, pixels: torch.Tensor) -> torch.Tensor:
        return 1 - pixels


def test_a_step_has_the_gradient_of_the_formula(small_cnn: SmallCNN, digits: Dataset) -> None:
    """A half of ten pictures, and one, carry the trigger: rows 0, 1, 3, 5, 6 and 8."""
    model, suspect = small_cnn.eval(), copy.deepcopy(small_cnn).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    clean = digits.select(range(10))
    (batch,) = in_pixels(clean).batches(10)
    run, trigger = toys.a_run(model=model), Negative()
    method = purifiers.AdaptiveUnlearning(taught=0.7, share=0.5)
    method._fill(model, suspect, batch, trigger, clean, run)
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    shown = batch.pixels.clone()
    rows = [0, 1, 3, 5, 6, 8]
    shown[rows] = 1 - shown[rows]
    scores, answers = model(clean.encode(255 * shown)), suspect(clean.encode(255 * batch.pixels)).softmax(dim=1)
    divergence = (answers * (answers.log() - scores.log_softmax(dim=1))).sum(dim=1).mean()
    model.zero_grad()
    (0.7 * divergence + 0.3 * F.cross_entropy(scores, batch.labels)).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, got[name], atol=1e-6), name
    assert trigger.steps == 1


def test_where_no_trigger_stands_out_it_is_scale_invariant_fst(
    small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_unlearning, "followers", lambda *_, **__: [])
    data = digits.select(range(60))
    result = purify(small_cnn, data, purifiers.AdaptiveUnlearning(), seed=3, device="cpu")
    other = purify(small_cnn, data, purifiers.ScaleInvariantFST(), seed=3, device="cpu")
    assert result.record["notes"] == [
        "AdaptiveUnlearning: no trigger to few classes stands out, so there is none to unlearn; the features are "
        "shifted by scale-invariant-fst.",
        *other.record["notes"],
    ]
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


@pytest.mark.parametrize(("rate", "expected"), [(None, [0.02, 0.005, 0.00125]), (0.5, [0.5])])
def test_a_model_that_forgets_is_tuned_again_at_a_lower_rate(
    rate: float | None, expected: list[float], backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt starts from the suspect; the last one that may be made forgets as well."""
    rates, model = [], backdoored[0]
    weights = copy.deepcopy(model.state_dict())

    def forgets(self: object, tuned: nn.Module, suspect: nn.Module, *rest: object) -> None:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tuned.state_dict().items())
        rates.append(rest[-1])
        nn.init.zeros_(tuned.classifier.weight)

    monkeypatch.setattr(adaptive_unlearning, "followers", lambda *_, **__: [[Negative()]])
    monkeypatch.setattr(purifiers.AdaptiveUnlearning, "_unlearn", forgets)
    method = purifiers.AdaptiveUnlearning(learning_rate=rate)
    result = purify(model, digits.select(range(100)), method, seed=0, device="cpu")
    assert rates == expected
    notes = [each for each in result.record["notes"] if "the model forgot" in each]
    assert len(notes) == len(expected)
    assert notes[0].startswith(f"at a learning rate of {expected[0]:g} the model forgot ")
    assert result.record["usable"] is False


def test_texts_are_refused_by_adaptive_unlearning(reviews: Dataset, text_victim: nn.Module) -> None:
    message = r"^AdaptiveUnlearning searches pixels for a trigger, but .* holds text\. Try pam,"
    with pytest.raises(UnbackdoorError, match=message):
        purify(text_victim, reviews, purifiers.AdaptiveUnlearning())
