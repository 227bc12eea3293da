"""Scale-invariant FST: the same function in gives the same function out, its loss by hand, and how strong it is."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, purifiers, purify
from unbackdoor._models.calling import probe
from unbackdoor._models.head import features, head_of
from unbackdoor._models.hooks import without_dropout
from unbackdoor.purifiers import _equal_steps, _shift, _strength, scale_invariant_fst
from unbackdoor.purifiers._calibrated import calibrated_temperature
from unbackdoor.purifiers._head_units import ROW, in_own_units, turn_


class Scaled(nn.Module):
    """Multiplies what it is given; it has no parameters."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Normalised(nn.Module):
    """A convolution, BatchNorm, ReLU, the mean over places, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.factor: nn.Module = nn.Identity()
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.factor(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture(scope="module")
def suspect(digits: Dataset) -> Normalised:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normalised()
        data = digits.select(range(600))
        trained = purify(model, data, purifiers.FineTuning(epochs=10, learning_rate=0.5, batch_size=16)).model
    assert isinstance(trained, Normalised)
    return trained.eval()


def answers(model: nn.Module, data: Dataset, method: object) -> Tensor:
    made = purify(model, data, method, seed=3, precision="fp32").model
    with torch.no_grad():
        return made(encoded(data, made))


def encoded(data: Dataset, model: nn.Module) -> Tensor:
    """All pictures as the model takes them."""
    made = data.encode(data.items)
    assert isinstance(made, Tensor)
    return made.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("factor", [1 / 8, 3.0])
@pytest.mark.parametrize("strength", [1.0, 0.0, None])
def test_larger_features_and_a_smaller_head_change_nothing(
    factor: float, strength: float | None, suspect: Normalised, digits: Dataset
) -> None:
    """In float64, where rounding stays rounding however long one tunes."""
    method = purifiers.ScaleInvariantFST(strength=strength, epochs=2, batch_size=16)
    data = digits.select(range(600, 800))
    one = copy.deepcopy(suspect).double()
    moved = copy.deepcopy(one)
    moved.factor = Scaled(factor)
    with torch.no_grad():
        moved.head.weight.div_(factor)
    assert torch.allclose(answers(one, data, method), answers(moved, data, method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("factor", "strength"), [(1 / 8, 1.0), (8.0, 1.0), (8.0, 0.0)])
def test_a_factor_in_the_last_normalisation_changes_nothing(
    factor: float, strength: float, suspect: Normalised, digits: Dataset
) -> None:
    method = purifiers.ScaleInvariantFST(strength=strength, epochs=2, batch_size=16)
    data = digits.select(range(600, 800))
    one = copy.deepcopy(suspect).double()
    folded = copy.deepcopy(one)
    with torch.no_grad():
        folded.head.weight.div_(factor)
        folded.norm.weight.mul_(factor)
        folded.norm.bias.mul_(factor)
    assert torch.allclose(answers(one, data, method), answers(folded, data, method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [8.0, pytest.param(1 / 8, marks=pytest.mark.thorough)])
def test_in_float32_the_same_classes_come_out(factor: float, suspect: Normalised, digits: Dataset) -> None:
    data = digits.select(range(600, 900))
    moved = copy.deepcopy(suspect)
    moved.factor = Scaled(factor)
    with torch.no_grad():
        moved.head.weight.div_(factor)
    one, other = (answers(model, data, purifiers.ScaleInvariantFST(epochs=3)) for model in (suspect, moved))
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_a_surer_head_is_purified_alike(strength: float, suspect: Normalised, digits: Dataset) -> None:
    """The same classes with scores three times as large: the result's scores are three times as large."""
    method = purifiers.ScaleInvariantFST(strength=strength, epochs=2, batch_size=16)
    data, made = digits.select(range(600, 800)), []
    for factor in (6.0, 18.0):
        sure = copy.deepcopy(suspect).double()
        with torch.no_grad():
            for parameter in sure.head.parameters():
                parameter.mul_(factor)
        assert calibrated_temperature(sure, data, toys.a_run().arithmetic) > 1
        made.append(answers(sure, data, method))
    assert torch.allclose(3 * made[0], made[1], rtol=1e-5, atol=1e-5)


def test_dropout_is_off_while_it_shifts_and_back_afterwards(suspect: Normalised, digits: Dataset) -> None:
    data, method = digits.select(range(600, 800)), purifiers.ScaleInvariantFST(strength=1, epochs=2)
    dropping = copy.deepcopy(suspect)
    dropping.factor = nn.Dropout(0.5)
    purified, expected = (purify(each, data, method, seed=3, precision="fp32").model for each in (dropping, suspect))
    assert purified.factor.p == 0.5
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, purified.state_dict()[name]), name


class StochasticDepth(nn.Dropout):
    """The name of torchvision's, which has `p` and nothing of dropout in its name."""


class DropPath(nn.Module):
    """As in timm: its rate is `drop_prob`."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


def test_the_rates_of_other_libraries_are_off_and_come_back() -> None:
    depth, path, alpha = StochasticDepth(0.5), DropPath(0.2), nn.AlphaDropout(0.1)
    with without_dropout(nn.Sequential(depth, path, alpha)):
        assert [depth.p, path.drop_prob, alpha.p] == [0, 0, 0]
    assert [depth.p, path.drop_prob, alpha.p] == [0.5, 0.2, 0.1]


def test_texts_are_shifted_without_dropout_too(reviews: Dataset) -> None:
    """With attention's own rate, and each layer's; the network without them is an independent answer."""
    one, other = toys.classifier("bert", seed=1), toys.classifier("bert", seed=1)
    rates = [0.0, 0.0]
    for number, (model, rate) in enumerate([(one, 0.4), (other, 0.0)]):
        for module in model.modules():
            for name in [name for name, old in vars(module).items() if "drop" in name and isinstance(old, float)]:
                setattr(module, name, rate)
            if isinstance(module, nn.Dropout):
                module.p = rate
        rates[number] = sum(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    assert rates[0] > 1
    assert rates[1] == 0
    method = purifiers.ScaleInvariantFST(strength=1, epochs=1)
    made = [purify(model, reviews.select(range(40)), method, seed=0, precision="fp32").model for model in (one, other)]
    for name, tensor in made[0].state_dict().items():
        assert torch.equal(tensor, made[1].state_dict()[name]), name


def test_texts_are_scale_invariant_too(reviews: Dataset) -> None:
    from unbackdoor._models.calling import logits

    model = toys.classifier("bert", seed=1).double()
    grown = copy.deepcopy(model)
    inner = head_of(model, probe(model, reviews))
    with torch.no_grad():
        grown.get_submodule(inner.name).weight.div_(8)
    name, _, last = inner.name.rpartition(".")
    owner = grown.get_submodule(name)
    setattr(owner, last, nn.Sequential(Scaled(8), getattr(owner, last)))
    data = reviews.select(range(60))
    method = purifiers.ScaleInvariantFST(strength=1, epochs=1)
    one, other = (
        logits(purify(suspect, data, method, seed=0, precision="fp32").model, data.encode(data.items))
        for suspect in (model, grown)
    )
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [0.125, 8.0])
def test_the_lengths_of_filters_in_front_of_a_normalisation_change_nothing(
    factor: float, suspect: Normalised, digits: Dataset
) -> None:
    """The same network with other lengths gives the same answers, and its filters keep their length."""
    same = copy.deepcopy(suspect).double()
    grown = copy.deepcopy(same)
    grown.norm.eps *= factor**2
    with torch.no_grad():
        grown.conv.weight.mul_(factor)
        grown.conv.bias.mul_(factor)
        grown.norm.running_mean.mul_(factor)
        grown.norm.running_var.mul_(factor**2)
        for model in (grown, same):
            model.conv.bias.requires_grad_(False)  # a vector, whose steps are not scaled
    data = digits.select(range(600, 700))
    method = purifiers.ScaleInvariantFST(strength=1, epochs=2)
    made = [purify(model, data, method, seed=3, precision="fp32").model for model in (same, grown)]
    inputs = encoded(data, same)
    with torch.no_grad():
        one, other = (model.eval()(inputs) for model in made)
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)
    assert torch.allclose(made[0].conv.weight * factor, made[1].conv.weight, rtol=1e-6, atol=1e-6)


def test_equal_steps_by_hand(small_cnn: SmallCNN, digits: Dataset) -> None:
    """Gradients of filters are multiplied by the mean squared length, the head's divided by that of its inputs."""
    model = copy.deepcopy(small_cnn).double()
    inputs = probe(model, digits.select(range(50)))
    head = head_of(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    given = features(model.eval(), inputs, head).square().sum(dim=1).mean()
    assert given > _equal_steps.LONGEST_INPUT**2

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with _equal_steps.equal_steps(model, head, inputs):
        scaled = gradients()
    for (name, parameter), before, after in zip(model.named_parameters(), plain, scaled, strict=True):
        if name.startswith(head.name):
            expected = before * _equal_steps.LONGEST_INPUT**2 / given
        elif parameter.ndim == 1:
            expected = before
        else:
            expected = before * parameter.square().sum() / len(parameter)
        assert torch.allclose(after, expected), name
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True)), "hooks are removed"


def test_the_model_computes_the_same_in_its_own_units_and_afterwards(suspect: Normalised, digits: Dataset) -> None:
    inputs = digits.encode(digits.items[:50])
    model = copy.deepcopy(suspect)
    with torch.no_grad():
        before = model(inputs)
        with in_own_units(model, head_of(model, inputs), inputs):
            assert torch.allclose(model(inputs), before, rtol=1e-4, atol=1e-4)
            weight = model.head.weight - model.head.weight.mean(0)
            assert weight.norm(dim=1).square().mean().sqrt().item() == pytest.approx(ROW, rel=1e-5)
            affine = torch.cat([model.norm.weight, model.norm.bias])
            assert affine.square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)
        assert torch.allclose(model(inputs), before, rtol=1e-4, atol=1e-4)


def test_a_normalisation_that_does_not_set_the_scale_is_left_alone(small_cnn: SmallCNN, digits: Dataset) -> None:
    """With a sigmoid after it, features do not grow with it."""
    small_cnn.features.append(nn.Sigmoid())
    before = small_cnn.features[5].weight.detach().clone()
    inputs = digits.encode(digits.items[:20])
    with in_own_units(small_cnn, head_of(small_cnn, inputs), inputs):
        assert torch.equal(small_cnn.features[5].weight, before)


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_a_head_turns_by_the_angle_and_keeps_length_and_mean(degrees: float) -> None:
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    turned = weight.clone()
    turn_(turned, degrees, torch.Generator().manual_seed(1))
    assert torch.allclose(turned.mean(0), weight.mean(0))
    one, two = weight - weight.mean(0), turned - turned.mean(0)
    assert two.norm().item() == pytest.approx(one.norm().item())
    assert ((one * two).sum() / one.norm() / two.norm()).item() == pytest.approx(math.cos(math.radians(degrees)))


def test_one_step_is_that_of_the_formula(digits: Dataset) -> None:
    """One layer, whose step can be written out: no body, and pixels are the features."""
    torch.manual_seed(0)
    suspect = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    data = replace(digits.select(range(50)), encode=replace(digits.encode, mean=(0.25,), std=(0.5,)))
    method = purifiers.ScaleInvariantFST(
        strength=0.5, alpha=2, share=0.7, temperature=3, epochs=1, learning_rate=0.1, batch_size=50
    )
    made = purify(suspect, data, method, seed=5, precision="fp32").model[1]

    x = ((data.pixels.double() / 255 - 0.25) / 0.5).flatten(1)
    s, bias = suspect[1].weight.detach(), suspect[1].bias.detach()
    length = math.sqrt(((s - s.mean(0)) ** 2).sum() / 10) / ROW
    sure = calibrated_temperature(suspect, data, toys.a_run().arithmetic)
    assert sure > 1
    start = s / length
    turn_(start, 45, torch.Generator().manual_seed(5))
    w, b = start.clone().requires_grad_(), (bias / sure).requires_grad_()
    scores = x * length / sure @ w.T + b
    p, q = ((x @ s.T + bias) / sure / 3).softmax(1), (scores / 3).softmax(1)
    goal, mine = s - s.mean(0), w - w.mean(0)
    cosine = (mine * goal).sum() / (goal.norm() * mine.detach().norm())  # of one length, which the step may leave
    loss = 0.3 * F.cross_entropy(scores, data.labels) + 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean() + cosine
    loss.backward()
    with torch.no_grad():
        w -= 0.1 * w.grad
        b -= 0.1 * b.grad
        mean = w.mean(0)
        w.copy_(mean + (w - mean) * (start - start.mean(0)).norm() / (w - mean).norm())
    assert torch.allclose(made.weight, w * length, rtol=0, atol=1e-8)
    assert torch.allclose(made.bias, b * sure, rtol=0, atol=1e-8)


def test_the_first_strength_within_the_margin_is_kept(suspect: Normalised, digits: Dataset) -> None:
    data = digits.select(range(600, 900))
    all_may_go = purify(suspect, data, purifiers.ScaleInvariantFST(margin=1, epochs=1), seed=0).record
    assert [note.split(" loses")[0] for note in all_may_go["notes"]] == ["strength 1 in 1 pass"]
    assert all_may_go["clean"]["held_out"] == 60
    assert all_may_go["examples_seen"] == 240

    hard = purifiers.ScaleInvariantFST(margin=0, epochs=1, alpha=100)
    made = purify(suspect, data, hard, seed=0).record
    lost = [note.split(" loses")[0] for note in made["notes"] if " loses " in note]  # one says that the steps are few
    assert lost == [
        *("strength 1 in 1 pass", "strength 1 in 3 passes"),
        *("strength 0.5 in 1 pass", "strength 0 in 1 pass"),
    ]
    assert made["clean"]["held_out"] == 60
    assert made["examples_seen"] == 6 * 240
    assert made["warnings"][0].startswith(
        "a backdoor may have stayed: strength 1 cost more than the margin of 0 points of accuracy, so 0 was used,"
    )
    assert not any("may have stayed" in warning for warning in all_may_go["warnings"])


@pytest.mark.parametrize(("lost", "made"), [(0.09, 2), (0.16, 2), (0.17, 4)])
def test_less_strength_is_tried_beyond_twice_the_margin_only(
    lost: float, made: int, suspect: Normalised, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = iter([_strength.Price(False, each) for each in (0.3, lost, 0.3, 0.3)])
    monkeypatch.setattr(_strength, "price", lambda *_: next(prices))
    method = purifiers.ScaleInvariantFST(epochs=1)
    record = purify(suspect, digits.select(range(600, 700)), method, seed=0, precision="fp32").record
    assert [note for note in record["notes"] if " loses " in note][-1].startswith(
        "strength 1 in 3 passes" if made == 2 else "strength 0 in 1 pass"
    )
    assert len([note for note in record["notes"] if " loses " in note]) == made
    assert any(
        f"strength 1 lost {100 * lost:.1f} points of accuracy on 20 held-out examples, more than the margin of 8, and "
        "was kept: less strength leaves more of a backdoor. Give more clean examples." in warning
        for warning in record["warnings"]
    )


def test_where_none_is_within_the_margin_the_one_that_loses_least_is_kept(
    suspect: Normalised, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strength 0 comes first and loses less than strength 1, which is alone against a huge alpha."""
    data = digits.select(range(600, 900))
    hard = purifiers.ScaleInvariantFST(margin=0, epochs=1, alpha=100, learning_rate=0.3)
    alone = {}
    for strengths in ((0.0,), (0.0, 1.0), (1.0,)):
        monkeypatch.setattr(scale_invariant_fst, "TRIALS", [(strength, 1.0) for strength in strengths])
        alone[strengths] = purify(suspect, data, hard, seed=0)
    notes = alone[0.0, 1.0].record["notes"]
    lost = [note.split(" loses ")[1].split(" ")[0] for note in notes if " loses " in note]
    assert 0 < float(lost[0]) < float(lost[1])
    for name, tensor in alone[(0.0,)].model.state_dict().items():
        assert torch.equal(alone[0.0, 1.0].model.state_dict()[name], tensor), name


def test_a_strength_of_0_has_nothing_of_the_suspect_s_answers(suspect: Normalised, digits: Dataset) -> None:
    data = digits.select(range(600, 700))
    one, two = (
        purify(suspect, data, purifiers.ScaleInvariantFST(strength=0, epochs=1, share=share, alpha=alpha), seed=0).model
        for share, alpha in ((0.9, 3.0), (0.1, 0.0))
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_the_passes_of_the_trials(suspect: Normalised, digits: Dataset) -> None:
    hard = purifiers.ScaleInvariantFST(margin=0, epochs=4, alpha=100)
    record = purify(suspect, digits.select(range(600, 700)), hard, seed=0).record
    lost = [note.split(" loses")[0] for note in record["notes"] if " loses " in note]
    assert [each.split(" in ")[1] for each in lost] == ["4 passes", "12 passes", "4 passes", "1 pass"]
    assert record["examples_seen"] == (4 + 12 + 4 + 1) * 80


def test_batches_that_are_left_open_make_twenty_steps(suspect: Normalised, digits: Dataset) -> None:
    """Of 8 to 32 images, at a rate in proportion; the same size and rate given make the same model."""
    for count, batch_size in ((100, 8), (300, 15), (640, 32), (1797, 32)):
        assert toys.a_run().smaller(32, count) == batch_size
    data = digits.select(range(600, 900))
    shift = purifiers.ScaleInvariantFST(strength=1, epochs=1)
    one, other, large = (
        purify(suspect, data, each, seed=0).model
        for each in (
            shift,
            replace(shift, batch_size=15, learning_rate=0.025 * 15 / 32),
            replace(shift, batch_size=15),  # a size that is given keeps the rate
        )
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert not torch.equal(one.get_submodule("head").weight, large.get_submodule("head").weight)


def test_a_given_strength_takes_the_given_passes(suspect: Normalised, digits: Dataset) -> None:
    data = digits.select(range(600, 700))
    for strength in (1.0, 0.0):
        record = purify(suspect, data, purifiers.ScaleInvariantFST(strength=strength, epochs=3), seed=0).record
        assert record["examples_seen"] == 300


class TestUnlabelled:
    """Examples without labels: who teaches them, and what the method makes of them."""

    def test_the_first_result_teaches_where_it_names_another_class(self, digits: Dataset) -> None:
        torch.manual_seed(0)
        one, two = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double().eval() for _ in range(2))
        (batch,) = digits.select(range(60)).batches(60)
        x = encoded(digits.select(range(60)), one)
        with torch.no_grad():
            first, second = one(x), two(x)
        rows = [a if a.argmax() == b.argmax() else b for a, b in zip(first, second, strict=True)]
        assert 0 < sum(torch.equal(row, b) for row, b in zip(rows, second, strict=True)) < 60
        run = toys.a_run()
        assert torch.allclose(_shift.taught(one, two, batch, run), torch.stack(rows))
        assert torch.allclose(_shift.taught(one, None, batch, run), first)

    def test_labels_count_where_there_are_any(self, digits: Dataset) -> None:
        scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
        (batch,) = replace(digits.select(range(6)), labels=torch.tensor([3, -1, 2, -1, -1, 0])).batches(6)
        own = scores.log_softmax(1)
        expected = -(own[0, 3] + own[2, 2] + own[5, 0]) / 6
        assert torch.allclose(_shift.labelled(scores, batch), expected)

    def test_twice_the_steps_on_all_and_a_note(self, suspect: Normalised, digits: Dataset) -> None:
        clean, others = digits.select(range(600, 700)), digits.select(range(700, 1000))
        made = purify(suspect, clean, purifiers.ScaleInvariantFST(margin=1, epochs=10), unlabelled=others).record
        assert made["examples_seen"] == 10 * 80 + 4 * 380  # 2 * 10 * 80 / 380 passes
        assert made["unlabelled"] == 300
        assert made["notes"][-1].startswith("with 300 unlabelled examples it loses ")
        assert made["notes"][-1].endswith(" points of accuracy on 20 held-out examples.")
        assert made["clean"]["held_out"] == 20
        fixed = purify(suspect, clean, purifiers.ScaleInvariantFST(strength=1, epochs=10), unlabelled=others).record
        assert fixed["examples_seen"] == 10 * 100 + 5 * 400

    def test_where_it_loses_more_the_first_result_is_kept(
        self, suspect: Normalised, digits: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ruined(self: object, model: nn.Module, *_: object, **__: object) -> None:
            with torch.no_grad():
                model.get_submodule("head").weight.zero_()

        clean, method = digits.select(range(600, 800)), purifiers.ScaleInvariantFST(margin=1, epochs=20, alpha=0)
        alone = purify(suspect, clean, method).model
        monkeypatch.setattr(purifiers.ScaleInvariantFST, "_tune_again", ruined)
        both = purify(suspect, clean, method, unlabelled=digits.select(range(800, 900)))
        assert both.record["purified_accuracy_on_clean"]["value"] > 0.3  # a head of zeros has about 0.1
        assert "unlabelled examples it loses" in both.record["notes"][-1]
        assert torch.equal(both.model.head.weight, alone.head.weight)

    def test_strength_0_uses_none(self, suspect: Normalised, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scale_invariant_fst, "TRIALS", [(0.0, 1.0)])
        method = purifiers.ScaleInvariantFST(epochs=1)
        made = purify(suspect, digits.select(range(600, 700)), method, unlabelled=digits.select(range(700, 800)))
        assert "the unlabelled examples were not used: strength 0 tunes on labels alone." in made.record["notes"]
        assert made.record["examples_seen"] == 80
