"""Networks of other people that are unlike those of the tests elsewhere: what they return, keep and compute with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unbackdoor as ub
from unbackdoor import detectors, guards, purifiers
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import logits
from unbackdoor._models.head import head_of
from unbackdoor.purifiers import adaptive_unlearning


class Net(nn.Module):
    """A small network for the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.drop(self.features(x)))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


# In training mode a network may return more than in eval mode.


class TwoHeads(Net):
    """As DeiT's authors wrote their distilled model: both answers while it trains, their mean afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Any:
        seen = self.features(x)
        answers = self.fc(seen), self.other(self.drop(seen))
        return answers if self.training else (answers[0] + answers[1]) / 2


class Auxiliary(TwoHeads):
    """As the first GoogLeNets for torch: the answers of auxiliary heads come first while it trains."""

    def forward(self, x: Tensor) -> Any:
        seen = self.drop(self.features(x))
        return (self.other(seen), self.fc(seen)) if self.training else self.fc(seen)


class MoreInTraining(TwoHeads):
    """Features and scores in eval mode; another order, and one array more, in training mode."""

    def forward(self, x: Tensor) -> Any:
        seen = self.features(x)
        return (self.fc(seen), self.other(seen), seen) if self.training else (seen, self.fc(seen))


def _scores_in_training(model: Any, x: Tensor) -> Tensor:
    seen = model.features(x)
    return (model.fc(seen) + model.other(seen)) / 2 if type(model) is TwoHeads else model.fc(seen)


@pytest.mark.parametrize("kind", [TwoHeads, Auxiliary, MoreInTraining])
def test_what_a_network_returns_while_it_trains_is_known_by_its_answer_in_eval_mode(
    kind: Callable[[], nn.Module], digits: Dataset
) -> None:
    model = made(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits(model, digits.inputs(slice(8)))
    model.train()
    model.drop.eval()  # nothing is drawn, so that the expected scores are known
    model.features.eval()
    inputs = digits.inputs(slice(8))
    torch.testing.assert_close(logits(model, inputs), _scores_in_training(model, inputs))
    assert [module.training for module in model.modules()].count(True) == 3  # the network and both of its heads
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ub.purify(made(kind), digits.select(range(40)), purifiers.FineTuning(epochs=1), device="cpu")


class Unclear(TwoHeads):
    """Another answer in training mode than in eval mode."""

    def forward(self, x: Tensor) -> Any:
        seen = self.features(x)
        return (2 * self.fc(seen), self.other(seen)) if self.training else self.fc(seen)


def test_what_a_network_returns_while_it_trains_may_be_unclear(digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(made(Unclear), digits.select(range(40)), purifiers.FineTuning(epochs=1), device="cpu")
    assert str(refused.value) == (
        "Unclear returns 2 arrays in training mode, and neither one of them nor their mean is its answer in eval mode. "
        "Wrap it in a module that returns the class scores alone."
    )


# Parameters and answers of other types.


class Counted(Net):
    """Its first parameter is a whole number, as of trainers that keep their step with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.tensor([3]), requires_grad=False)


@pytest.mark.parametrize("kind", [Counted, lambda: Counted().double()])
def test_a_parameter_that_is_a_whole_number(kind: Callable[[], nn.Module], digits: Dataset) -> None:
    model = made(kind)
    assert next(model.parameters()).dtype == torch.int64
    plain = made(Net)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = ub.evaluate(plain, digits.select(range(100)), device="cpu", precision="fp32").clean_accuracy
    assert ub.evaluate(model, digits.select(range(100)), device="cpu", precision="fp32").clean_accuracy == expected
    for method in (
        purifiers.FineTuning(epochs=1),
        purifiers.FST(epochs=1),
        purifiers.CLP(),
        purifiers.Then(purifiers.CLP(), purifiers.FineTuning(epochs=1)),
    ):
        purified = ub.purify(model, digits.select(range(40)), method, device="cpu").model
        assert {name: tensor.dtype for name, tensor in purified.state_dict().items()} == {
            name: tensor.dtype for name, tensor in model.state_dict().items()
        }
        assert int(purified.steps) == 3


class Cast(Net):
    """It casts its answer."""

    to_type = torch.float16

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.to_type)


class CastWide(Cast):
    """It casts its answer to the wide type."""

    to_type = torch.float64


@pytest.mark.parametrize("kind", [Cast, CastWide])
def test_answers_of_another_type_than_the_weights(kind: Callable[[], nn.Module], digits: Dataset) -> None:
    assert head_of(made(kind), digits.inputs(slice(8))).name == "fc"
    ub.purify(made(kind), digits.select(range(40)), purifiers.FST(epochs=1), device="cpu", precision="fp32")


class InPlace(Net):
    """It normalises its inputs itself, in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.2).mul_(1.5))


class NotInPlace(Net):
    """The same computation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.2) * 1.5)


def test_a_network_that_changes_its_inputs(digits: Dataset) -> None:
    inputs = digits.inputs(slice(8))
    before = inputs.clone()
    logits(made(InPlace), inputs)
    assert torch.equal(inputs, before)
    for method in (purifiers.ScaleInvariantFST(epochs=1, strength=1), purifiers.FineTuning(epochs=1)):
        one, other = (
            ub.purify(made(kind), digits.select(range(40)), method, device="cpu").model
            for kind in (InPlace, NotInPlace)
        )
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


# Networks without gradients.


class WithoutGradients(Net):
    """It never computes gradients, as deployed models often do not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class InInferenceMode(Net):
    """The same by the newer context."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


class Detached(Net):
    """Its features are detached from its head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).detach())


@pytest.mark.parametrize("kind", [WithoutGradients, InInferenceMode])
@pytest.mark.parametrize(
    "method",
    [
        purifiers.FineTuning(epochs=1),
        purifiers.FST(epochs=1),
        purifiers.ScaleInvariantFST(epochs=1, strength=1),
        purifiers.NeuralCleanse(),
        purifiers.IBAU(),
        purifiers.CLP(),  # which layer reads which is known by the backward pass
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_network_without_gradients_is_refused_by_what_it_is(
    kind: Callable[[], nn.Module], method: Any, digits: Dataset
) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(made(kind), digits.select(range(40)), method, device="cpu")
    assert str(refused.value) == (
        f"{kind.__name__} answers without gradients, so it cannot be tuned or searched. Take torch.no_grad, "
        "torch.inference_mode and detach out of its forward."
    )


def test_a_search_for_a_trigger_needs_gradients_of_the_inputs(digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match=r"^Detached answers without gradients, so it cannot"):
        ub.purify(made(Detached), digits.select(range(40)), purifiers.NeuralCleanse(), device="cpu")


def test_what_needs_no_gradients_takes_such_a_network(digits: Dataset) -> None:
    trained = made(Net)
    optimizer = torch.optim.Adam(trained.parameters(), 0.01)
    for _ in range(30):  # an audit says nothing of a model near chance
        F.cross_entropy(trained(digits.inputs(slice(500))), digits.labels[:500]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = made(WithoutGradients)
    model.load_state_dict(trained.state_dict())
    assert ub.evaluate(model, digits.select(range(200)), device="cpu").clean_accuracy.value > 0.8
    ub.purify(model, digits.select(range(100)), purifiers.FinePruning(epochs=0), device="cpu")
    for kind in (WithoutGradients, InInferenceMode, Detached):  # searches would find nothing, whatever there is
        model = made(kind)
        model.load_state_dict(trained.state_dict())
        with pytest.raises(UnbackdoorError, match=rf"^{kind.__name__} answers without gradients, so it cannot"):
            ub.audit(model, digits.select(range(200)), device="cpu")


class Larger(Detached):
    """Most of its weights are in the part that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 128))


@pytest.mark.parametrize("method", [purifiers.FineTuning(epochs=1), purifiers.FST(epochs=1)])
def test_weights_that_no_gradient_reaches_are_warned_of_once(method: Any, digits: Dataset) -> None:
    warnings = ub.purify(made(Larger), digits.select(range(40)), method, device="cpu").record["warnings"]
    assert [warning for warning in warnings if "gradient" in warning] == [
        "Larger passes no gradient to most of its weights (features.1.weight, say), so they stay as they are, and a "
        "backdoor with them. Take torch.no_grad and detach out of its forward."
    ]
    for kind in (Net, Detached):  # most of the weights of the second are in its head
        warnings = ub.purify(made(kind), digits.select(range(40)), method, device="cpu").record["warnings"]
        assert not any("gradient" in warning for warning in warnings)


class Recomputing(Net):
    """It keeps no activations, as large networks do to save memory."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.features, x, use_reentrant=self.reentrant))


class RecomputingAnew(Recomputing):
    """The same in the older way, which knows no gradients of single tensors."""

    reentrant = True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("kind", "method"),
    [(Recomputing, purifiers.BNA(epochs=1, reverse_steps=2)), (RecomputingAnew, purifiers.IBAU())],
)
def test_what_cannot_be_recomputed_is_named(kind: Callable[[], nn.Module], method: Any, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(made(kind), digits.select(range(40)), method, device="cpu")
    assert str(refused.value) == (
        f"{kind.__name__} recomputes its activations by torch.utils.checkpoint, which this computation does not allow. "
        "Switch that off in its module."
    )
    ub.purify(made(kind), digits.select(range(40)), purifiers.ScaleInvariantFST(epochs=1, strength=1), device="cpu")


class WithLengths(Net):
    """It needs a second input."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_a_network_of_several_inputs_says_how_it_takes_one(digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.evaluate(made(WithLengths), digits.select(range(20)), device="cpu")
    assert str(refused.value) == (
        "WithLengths cannot take inputs of shape (8, 1, 8, 8) (WithLengths.forward() missing 1 required positional "
        "argument: 'lengths'). Wrap it in a module that takes these alone."
    )


# Heads.


class Pooled(Net):
    """A linear head on pooled features: what the following ones compute as well."""

    last: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.features[3] = nn.Identity()
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x).mean(dim=(2, 3)))


class ConvolutionHead(Pooled):
    """A 1x1 convolution makes class scores at each position, and their mean is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x)).mean(dim=(2, 3))


class ConvolutionOfPooled(ConvolutionHead):
    """A 1x1 convolution of pooled features, as of MobileNet."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.adaptive_avg_pool2d(self.features(x), 1)).flatten(1)


class LogarithmsOfConvolution(ConvolutionHead):
    """The logarithms of probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(dim=1)


class Tempered(Pooled):
    """A temperature divides its scores."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0.25


class RectifiedHead(ConvolutionHead):
    """As of SqueezeNet: what lies between the convolution and the mean makes it no linear head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x)).relu().mean(dim=(2, 3))


def with_the_weights_of(model: nn.Module, kind: Callable[[], nn.Module]) -> nn.Module:
    other, state = made(kind), model.state_dict()
    factor = 0.25 if kind is Tempered else 1.0
    state |= {name: state[name] * factor for name in ("last.weight", "last.bias")}
    state["last.weight"] = state["last.weight"].view(other.state_dict()["last.weight"].shape)
    other.load_state_dict(state)
    return other


EQUAL_HEADS = [ConvolutionHead, ConvolutionOfPooled, LogarithmsOfConvolution, Tempered]


@pytest.mark.parametrize("kind", EQUAL_HEADS)
@pytest.mark.parametrize(
    "method",
    [
        purifiers.ScaleInvariantFST(epochs=1, strength=1),
        purifiers.FTInit(epochs=1),
        purifiers.LinearProbing(epochs=1),
        purifiers.FinePruning(epochs=1),
        purifiers.NAD(epochs=1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_head_that_computes_as_a_linear_layer_is_purified_as_one(
    kind: Callable[[], nn.Module], method: Any, digits: Dataset
) -> None:
    plain = made(Pooled)
    model = with_the_weights_of(plain, kind)
    clean = digits.select(range(60))
    before = torch.get_rng_state()
    expected, purified = (ub.purify(each, clean, method, device="cpu", precision="fp32") for each in (plain, model))
    assert torch.equal(torch.get_rng_state(), before)
    assert purified.record["head"] == expected.record["head"] == "last"
    assert type(purified.model.last) is type(model.last)
    assert [(name, part.shape, part.dtype) for name, part in purified.model.state_dict().items()] == [
        (name, part.shape, part.dtype) for name, part in model.state_dict().items()
    ]
    one, other = (each.model(digits.inputs(slice(200))).log_softmax(dim=1) for each in (expected, purified))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    assert not torch.equal(purified.model.last.weight, model.last.weight)


@pytest.mark.parametrize("kind", EQUAL_HEADS)
def test_a_head_that_computes_as_a_linear_layer_is_audited_as_one(
    kind: Callable[[], nn.Module], digits: Dataset
) -> None:
    plain = made(Pooled)
    optimizer = torch.optim.Adam(plain.parameters(), 0.03)
    for _ in range(60):  # an audit says nothing of a model near chance
        F.cross_entropy(plain(digits.inputs(slice(500))), digits.labels[:500]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = with_the_weights_of(plain, kind)
    expected, finding = (
        ub.audit(each, digits.select(range(200)), detectors=[detectors.Noise()], device="cpu", precision="fp32")
        for each in (plain, model)
    )
    assert finding.verdict == expected.verdict != "cannot-judge"
    assert finding.findings[0].strongest.score == pytest.approx(expected.findings[0].strongest.score, rel=0.02)
    assert type(model.last) is type(made(kind).last)


class Binary(Pooled):
    """Two classes, by two rows of a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 2)


class OneOutput(Pooled):
    """Two classes by one output, made two as the message about such networks says."""

    rows = (0.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = super().forward(x)
        return torch.cat([0 * one, one], dim=1)


class OneOutputBothWays(OneOutput):
    """The output counts for one class and against the other."""

    rows = (-1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        one = Pooled.forward(self, x)
        return torch.cat([-one, one], dim=1)


class OneOutputLogarithms(OneOutput):
    """The logarithms of the probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        one = Pooled.forward(self, x)
        return torch.cat([F.logsigmoid(-one), F.logsigmoid(one)], dim=1)


@pytest.mark.parametrize("kind", [OneOutput, OneOutputBothWays, OneOutputLogarithms])
@pytest.mark.parametrize(
    "method",
    [purifiers.ScaleInvariantFST(epochs=1, strength=1), purifiers.FTInit(epochs=1), purifiers.FinePruning(epochs=1)],
    ids=lambda method: type(method).__name__,
)
def test_a_head_of_one_output_is_purified_as_one_of_two(kind: Any, method: Any, digits: Dataset) -> None:
    model, plain = made(kind), made(Binary)
    state = model.state_dict()
    rows = torch.tensor(kind.rows)
    state |= {"last.weight": rows[:, None] * state["last.weight"], "last.bias": rows * state["last.bias"]}
    plain.load_state_dict(state)
    clean = replace(digits.select(range(60)), labels=digits.labels[:60] % 2, classes=None)
    expected, purified = (ub.purify(each, clean, method, device="cpu", precision="fp32") for each in (plain, model))
    assert purified.record["head"] == "last"
    assert {name: part.shape for name, part in purified.model.state_dict().items()} == {
        name: part.shape for name, part in model.state_dict().items()
    }
    assert not torch.equal(purified.model.last.weight, model.last.weight)
    one, other = (each.model(digits.inputs(slice(200))).log_softmax(dim=1) for each in (expected, purified))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_such_a_head_comes_out_in_its_own_type(dtype: torch.dtype, digits: Dataset) -> None:
    model = made(ConvolutionHead).to(dtype)
    purified = ub.purify(model, digits.select(range(40)), purifiers.ScaleInvariantFST(epochs=1, strength=1)).model
    assert {name: part.dtype for name, part in purified.state_dict().items()} == {
        name: part.dtype for name, part in model.state_dict().items()
    }


def test_a_guard_that_needs_no_linear_head_is_fitted_without_one(digits: Dataset) -> None:
    for kind in (RectifiedHead, ConvolutionHead):
        assert ub.fit_guard(made(kind), digits.select(range(200)), guards.Strip(), device="cpu").threshold is not None


class CosineHead(Net):
    """Scaled cosines are its class scores."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(self.features(x)), F.normalize(self.fc.weight))


@pytest.mark.parametrize("kind", [TwoHeads, RectifiedHead, CosineHead])
@pytest.mark.parametrize("method", [purifiers.Auto(), purifiers.FST(), purifiers.ScaleInvariantFST()])
def test_a_method_that_needs_a_linear_head_names_one_that_needs_none(
    kind: Callable[[], nn.Module], method: Any, digits: Dataset
) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(made(kind), digits.select(range(60)), method, device="cpu")
    assert str(refused.value) in [
        f"{kind.__name__} has no final linear layer that makes its logits, which {owner} needs. Name one with `head`, "
        "end the model in an nn.Linear, or take fine-tuning."
        for owner in ("this method", "Auto")
    ]
    ub.purify(made(kind), digits.select(range(60)), purifiers.FineTuning(epochs=1), device="cpu")


def test_a_method_that_searches_first_refuses_a_model_without_a_head_before_that(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It searched triggers to all classes, and then needed the head to unlearn them."""
    monkeypatch.setattr(adaptive_unlearning, "followers", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(UnbackdoorError, match="which AdaptiveUnlearning needs"):
        ub.purify(made(CosineHead), digits.select(range(60)), purifiers.AdaptiveUnlearning(), device="cpu")


def test_one_output_says_how_it_becomes_two(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(UnbackdoorError) as refused:
        ub.evaluate(model, digits.select(range(10)), device="cpu")
    assert str(refused.value) == (
        "Sequential has one output; a classifier with at least 2 classes is expected (regression is not supported). If "
        "it tells two classes apart by a logit x, wrap it in a module that returns torch.cat([0 * x, x], dim=1)."
    )


# What modules keep.


class OfComplexNumbers(Net):
    """A filter in the frequencies of an image, as of GFNet: complex numbers, stored as pairs in a fourth dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(1, 8, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.filter)))


def test_only_convolutions_are_laid_out_anew(digits: Dataset) -> None:
    model = made(OfComplexNumbers)
    for method in (purifiers.FineTuning(epochs=1), purifiers.FST(epochs=1), purifiers.CLP()):
        purified = ub.purify(model, digits.select(range(40)), method, device="cpu").model
        assert purified.filter.stride() == model.filter.stride() == (80, 10, 2, 1)
    scored = ub.evaluate(model, digits.select(range(200)), device="cpu").clean_accuracy
    assert scored == ub.evaluate(model, digits.select(range(200)), device="cpu", precision="fp32").clean_accuracy


class Hooked(Net):
    """It takes its features from a hook, which is a function made within another one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self.features.register_forward_hook(lambda _module, _inputs, output: self.seen.update(x=output))

    def forward(self, x: Tensor) -> Tensor:
        self.features(x)
        return self.fc(self.seen["x"])


class HookedByMethod(Hooked):
    """The same, as a copy can have it."""

    def __init__(self) -> None:
        super().__init__()
        self.features._forward_hooks.clear()
        self.features.register_forward_hook(self.keep)

    def keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.seen.update(x=output)


@pytest.mark.parametrize("scored_before", [False, True])
def test_a_hook_that_a_copy_would_share_is_named(scored_before: bool, digits: Dataset) -> None:
    model = made(Hooked)
    if scored_before:  # then the copy finds features of other inputs
        ub.evaluate(model, digits.select(range(20)), device="cpu")
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(model, digits.select(range(40)), purifiers.FineTuning(epochs=1), device="cpu")
    assert str(refused.value).endswith(
        "It has a hook, which a copy of it shares if it is a function made within another one: let it be a method of "
        "the module."
    )
    ub.purify(made(HookedByMethod), digits.select(range(40)), purifiers.FineTuning(epochs=1), device="cpu")


def test_a_compiled_network_is_not_tuned(digits: Dataset) -> None:
    """Its hooks are not called, so most methods found no head, and others could miss what they watch."""
    compiled: Any = torch.compile(made(Net), backend="eager")
    with pytest.raises(UnbackdoorError) as refused:
        ub.audit(compiled, digits.select(range(200)))
    with pytest.raises(UnbackdoorError) as also:
        ub.purify(compiled, digits.select(range(40)), purifiers.FineTuning(epochs=1))
    assert str(refused.value) == str(also.value)
    assert str(refused.value) == (
        "OptimizedModule is compiled by torch.compile, which hides its layers, so it can be scored and not tuned or "
        "searched. Give the module that it was made of (its `_orig_mod`)."
    )


class Hidden(nn.Module):
    """Its layers are in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [Net()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_layers_in_a_plain_list_are_no_part_of_a_network(digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(made(Hidden), digits.select(range(40)), purifiers.FineTuning(epochs=1), device="cpu")
    assert str(refused.value) == (
        "Hidden has no weights of its own, so it can be scored and not tuned or searched. Layers in a plain list, "
        "tuple or dictionary are no part of a module: take nn.ModuleList."
    )


class WithExtraState(Net):
    """It keeps more than tensors in its state dict."""

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}


def test_a_state_that_is_no_tensor_is_named(digits: Dataset, tmp_path: Path) -> None:
    way_out = (
        "with nothing but tensors in its state dict, got _extra_state in WithExtraState. Take get_extra_state out of "
        "its modules."
    )
    for function, run in (
        ("purify", lambda: ub.purify(made(WithExtraState), digits, purifiers.FineTuning(), device="cpu")),
        ("save", lambda: ub.save(made(WithExtraState), tmp_path / "out")),
    ):
        with pytest.raises(UnbackdoorError) as refused:
            run()
        assert str(refused.value) == f"{function} takes model {way_out}"
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nclass WithExtraState(nn.Linear):\n    def get_extra_state(self):\n        return 3\n"
        "\ndef make():\n    return WithExtraState(2, 2)\n"
    )
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(UnbackdoorError) as refused:
        ub.load(tmp_path / "w.pt", factory=f"{tmp_path}/net.py:make")
    assert str(refused.value) == f"`factory` {tmp_path}/net.py:make must return a module {way_out}"


class Lazy(Net):
    """Its last layer learns its size from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(10)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_layer_without_a_size_is_named(digits: Dataset, tmp_path: Path) -> None:
    model, clean = made(Lazy), digits.select(range(60))
    calls: dict[str, Callable[[], object]] = {
        "purify": lambda: ub.purify(model, clean, purifiers.FineTuning(epochs=1), device="cpu"),
        "evaluate": lambda: ub.evaluate(model, clean, device="cpu"),
        "audit": lambda: ub.audit(model, clean, device="cpu"),
        "fit_guard": lambda: ub.fit_guard(model, clean, guards.Strip(), false_alarms=0.1, device="cpu"),
        "save": lambda: ub.save(model, tmp_path / "out"),
    }
    for owner, call in calls.items():
        with pytest.raises(UnbackdoorError) as refused:
            call()
        assert str(refused.value) == (
            f"{owner} takes model with all its weights, but fc.weight of Lazy has no size yet, as in a lazy layer. "
            "Call the module once on a batch, and load its weights, before."
        )
    logits(model, clean.inputs(slice(2)))
    ub.purify(model, clean, purifiers.FST(epochs=1), device="cpu")
