"""The contract of methods, attacks, detectors, guards and trainers, as checks for these and for a user's own.

    from unbackdoor.testing import check_method

    def test_my_method():
        check_method(MyMethod(), model, clean)

Each check raises an AssertionError that says which rule was broken.
"""

import copy
import dataclasses
import difflib
import inspect
import json
import math
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.audit import audit
from unbackdoor._detection.finding import Candidate, Detector, Finding
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.deciding import Decision
from unbackdoor._guarding.fit import fit_guard, load_guard
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Guard
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._poisoning.abilities import (
    ABILITIES,
    Covers,
    Crafts,
    Fits,
    Implants,
    is_learnt,
    is_repeatable,
    sources_of,
)
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.attacked import attacked_by
from unbackdoor._poisoning.poison import poison
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._purification.method import Method
from unbackdoor._purification.purify import purify
from unbackdoor._purification.run import Run
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._robust_training.train import Trained, train
from unbackdoor._robust_training.trainer import RobustTrainer, modalities_of, needs_clean
from unbackdoor._value import fields_of
from unbackdoor._value import value as value
from unbackdoor._victims.recipe import VictimRecipe


def check_method(
    method: Method, model: nn.Module, clean: Dataset, *, base: nn.Module | None = None, proxy: nn.Module | None = None
) -> None:
    """Check that a purifier keeps the contract: a checked value that changes only its own copy, repeatably.

    Args:
        method: a method with settings small enough to run twice.
        model: a small suspect; images or text.
        clean: a few labelled examples for it.
        base: a base, for methods that need one.
        proxy: a proxy, for methods that need one.
    """
    check_value(method)
    before = _state(model)
    modes = {name: module.training for name, module in model.named_modules()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)
    first = purify(model, clean, method, seed=1, device="cpu", base=base, proxy=proxy)
    assert torch.equal(torch.get_rng_state(), torch_state), "the method moved torch's global random state"
    assert str(np.random.get_state(legacy=False)) == str(numpy_state), "the method moved numpy's global random state"
    _assert_same(before, _state(model), "the method changed the model that it was given")
    assert modes == {name: module.training for name, module in model.named_modules()}, "the given model changed mode"
    after = _state(first.model)
    assert list(after) == list(before), "the method changed the keys of the model"
    assert any(not torch.equal(before[name], after[name]) for name in before), "the method changed nothing"
    for name, tensor in after.items():
        assert tensor.shape == before[name].shape, f"the method changed the shape of {name}"
        assert tensor.dtype == before[name].dtype, f"the method changed the type of {name}"
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{name} is not finite"
    assert not any(_hooks(module) for module in first.model.modules()), "the method left hooks behind"
    again = purify(model, clean, method, seed=1, device="cpu", base=base, proxy=proxy)
    _assert_same(after, _state(again.model), "the same seed gave other weights")
    json.dumps(first.record, allow_nan=False)


def check_attack(attack: Attack, data: Dataset, *, classes: int, surrogate: nn.Module | None = None) -> None:
    """Check that an attack keeps the contract: a checked value whose trigger is repeatable and touches only its rows.

    A member whose name looks like a misspelt ability, or whose signature differs from that of the ability, breaks the
    contract: elsewhere such a member is silently ignored.

    Args:
        attack: any attack.
        data: clean examples; at least a tenth of them of the target class; or prompts.
        classes: number of classes; 0 for prompts.
        surrogate: a clean model, for attacks that need one.
    """
    check_value(attack)
    _check_abilities(attack)
    before = data.identities(), data.labels.clone()
    state = torch.get_rng_state()
    poisonings = [
        poison(data, attack, rate=0.04, seed=3, classes=classes, surrogate=copy.deepcopy(surrogate)) for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state), "the attack moved torch's global random state"
    assert data.identities() == before[0], "the attack changed the examples that it was given"
    assert torch.equal(data.labels, before[1]), "the attack changed the labels that it was given"
    planted = poisonings[0].data.identities()
    assert planted == poisonings[1].data.identities(), "the same seed gave other examples"
    assert torch.equal(poisonings[0].rows, poisonings[1].rows), "the same seed drew other rows"
    assert len(poisonings[0].rows) == round(0.04 * len(data)), "the rate was not kept"
    untouched = torch.ones(len(data), dtype=torch.bool)
    untouched[poisonings[0].rows] = False
    untouched[poisonings[0].cover] = False
    kept = [planted[row] == before[0][row] for row in untouched.nonzero().flatten().tolist()]
    assert all(kept), "rows were changed that were not drawn"
    untouched[poisonings[0].cover] = True
    assert torch.equal(poisonings[0].data.labels[untouched], data.labels[untouched]), (
        "labels were changed that were not drawn"
    )
    if is_repeatable(attack):
        trigger = poisonings[0].trigger
        attacked = attacked_by(data, trigger, classes)
        if data.modality == "images":
            assert attacked.data.pixels.dtype == torch.uint8, "triggered pictures are not 8 bits"
        shown = dataclasses.replace(data, items=trigger.stamp(data.items))
        made_later = isinstance(attack, Implants) and is_learnt(attack)  # with the victim
        assert made_later or shown.identities() != before[0], "the trigger changes nothing"
        if isinstance(attacked, Triggered):
            moved = attacked.data.labels != attacked.wanted
            assert moved.all(), "examples count that are already where they should go"


def check_detector(detector: Detector, model: nn.Module, clean: Dataset, *, base: nn.Module | None = None) -> None:
    """Check that a detector keeps the contract: a checked value that changes nothing, and finds the same by its seed.

    Args:
        detector: with settings small enough to run twice.
        model: a small suspect that has learnt its task; images or text.
        clean: labelled examples for it, at least 2 of each class.
        base: for detectors that need one.
    """
    check_value(detector)
    before, states = _state(model), _random_states()
    watched = [_Watched(detector) for _ in range(2)]
    for each in watched:
        result = audit(model, clean, detectors=[each], base=base, seed=1, device="cpu", precision="fp32")
        json.dumps(result.to_json(), allow_nan=False)
    assert _random_states() == states, "the detector moved the global random state of numpy or torch"
    _assert_same(before, _state(model), "the detector changed the model that it was given")
    first, again = (each.finding for each in watched)
    assert first is not None, "the model is near chance on the examples, so nothing ran; give one that has learnt them"
    assert again is not None
    for candidate, other in zip(first.candidates, again.candidates, strict=True):
        assert _as_json(candidate) == _as_json(other), "the same seed gave another finding"
        for trigger, repeated in ((candidate.trigger, other.trigger), (candidate.control, other.control)):
            if trigger is not None and repeated is not None:
                _assert_same(trigger.arrays, repeated.arrays, "the same seed gave another trigger")


def check_guard(
    guard: Guard,
    model: nn.Module,
    clean: Dataset,
    *,
    base: nn.Module | None = None,
    reference: Perplexity | None = None,
) -> None:
    """Check that a guard keeps the contract: it changes nothing, and scores each input by itself, repeatably.

    It is fitted to one half of the examples at 10 % false alarms, and tried on the other half. How many of these raise
    an alarm follows a beta-binomial distribution; a number that has a probability of less than 1 in 10,000 there
    breaks the contract. A guard that changes every input raises none.

    Args:
        guard: with settings small enough to fit twice.
        model: a small suspect; images, text or conversations.
        clean: labelled examples for it, or prompts with answers, at least 60.
        base: the model that it was tuned from, for guards that need it.
        reference: a language model, for guards that need one.
    """
    check_value(guard)
    before, states = _state(model), _random_states()
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    known, fresh = clean.split(len(clean) // 2, seed=0)
    settings: dict[str, Any] = {"false_alarms": 0.1, "base": base, "reference": reference, "seed": 1}
    settings |= {"max_new_tokens": 8} if clean.modality == "conversations" else {}
    first, again = (fit_guard(model, known, guard, device="cpu", precision="fp32", **settings) for _ in range(2))
    decisions = _decided(first, model, fresh)
    assert _random_states() == states, "the guard moved the global random state of numpy or torch"
    _assert_same(before, _state(model), "the guard changed the model that it was given")
    assert modes == [module.training for module in model.modules()], "the given model changed mode"
    assert trained == [parameter.requires_grad for parameter in model.parameters()], "requires_grad was changed"
    assert not any(_hooks(module) for module in model.modules()), "the guard left hooks behind"
    assert first.threshold == again.threshold, "the same seed gave another threshold"
    assert first.learnt.keys() == again.learnt.keys(), "the same seed gave other arrays"
    _assert_same(first.learnt, again.learnt, "the same seed gave another array")
    assert _decided(again, model, fresh) == decisions, "the same seed gave another decision"
    order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(0))
    _assert_close(_decided(first, model, fresh.select(order)), [decisions[row] for row in order.tolist()], "its batch")
    alone = [_decided(first, model, fresh.select([row]))[0] for row in range(3)]
    _assert_close(alone, decisions[:3], "its batch")
    _assert_close(_decided(first, model, _unlabelled(fresh)), decisions, "labels")
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "guard")
        loaded = load_guard(Path(folder) / "guard", clean.encode, reference=reference)
    assert _decided(loaded, model, fresh) == decisions, "the guard decides otherwise after it was saved and loaded"
    if guard.suspicious != "all":
        _check_false_alarms(sum(decision.action != "pass" for decision in decisions), len(fresh), len(known))


def _unlabelled(data: Dataset) -> Dataset:
    """The same inputs without labels; prompts without answers."""
    blind = dataclasses.replace(data, labels=torch.full((len(data),), -1))
    if not isinstance(data.items, Conversations):
        return blind
    entries = tuple(dataclasses.replace(entry, answer="") for entry in data.items.entries)
    return dataclasses.replace(blind, items=Conversations(entries))


def _decided(fitted: FittedGuard, model: nn.Module, inputs: Dataset) -> list[Decision]:
    return fitted.decide(model, inputs, device="cpu", precision="fp32")


def _assert_close(decisions: list[Decision], expected: list[Decision], what: str) -> None:
    for decision, other in zip(decisions, expected, strict=True):
        assert decision.score is not None
        assert other.score is not None
        close = math.isclose(decision.score, other.score, rel_tol=1e-3, abs_tol=1e-5)
        assert close, f"the score of an input depends on {what}: {decision.score} is not {other.score}"


def _check_false_alarms(count: int, fresh: int, known: int) -> None:
    """Check the number of fresh examples with an alarm; their rank among those of the threshold is uniform."""
    from scipy.stats import betabinom

    held_out = known - known // 2
    rank = math.floor(0.1 * (held_out + 1) + 1e-9)
    likely = float(betabinom.sf(count - 1, fresh, rank, held_out + 1 - rank))
    assert likely > 1e-4, f"{count} of {fresh} clean examples raise an alarm, where 10 % were asked for"


def check_trainer(trainer: RobustTrainer, data: Dataset, recipe: VictimRecipe, *, clean: Dataset | None = None) -> None:
    """Check that a trainer keeps the contract: it trains the model that it is given, repeatably, and changes no data.

    Args:
        trainer: with settings small enough to run twice.
        data: a few labelled examples of at least two classes; poisoned or not.
        recipe: a small network and a short training; for texts with a `base`.
        clean: examples without poison, for trainers that need some.
    """
    check_value(trainer)
    examples = clean if needs_clean(trainer) else None
    assert data.modality in modalities_of(trainer), f"the trainer does not declare {data.modality} in `modality`"
    before, states = (data.identities(), data.labels.clone()), _random_states()
    watched = [_WatchedTrainer(trainer) for _ in range(2)]
    first, again = (
        train(data, each, recipe, seed=1, clean=examples, device="cpu", precision="fp32") for each in watched
    )
    assert _random_states() == states, "the trainer moved the global random state of numpy or torch"
    assert data.identities() == before[0], "the trainer changed the examples that it was given"
    assert torch.equal(data.labels, before[1]), "the trainer changed the labels that it was given"
    assert not first.model.training, "the model is not in eval mode"
    assert not any(_hooks(module) for module in first.model.modules()), "the trainer left hooks behind"
    fresh, weights = watched[0].fresh, _state(first.model)
    assert list(weights) == list(fresh), "the trainer changed the keys of the model"
    assert any(not torch.equal(fresh[name], weights[name]) for name in fresh), "the trainer changed nothing"
    for name, tensor in weights.items():
        assert tensor.shape == fresh[name].shape, f"the trainer changed the shape of {name}"
        assert tensor.dtype == fresh[name].dtype, f"the trainer changed the type of {name}"
    _assert_same(weights, _state(again.model), "the same seed gave other weights")
    _check_suspects(first, again, len(data))
    json.dumps(first.record, allow_nan=False)


def _check_suspects(first: Trained, again: Trained, count: int) -> None:
    """Check that distrusted rows exist, each once, with finite scores, and that the same seed distrusts the same."""
    suspects, other = first.suspects, again.suspects
    assert (suspects is None) == (other is None), "the same seed distrusted other rows"
    if suspects is None or other is None:
        return
    rows = suspects.rows
    assert len(rows) == len(rows.unique()), "a row is distrusted twice"
    assert not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < count, "a distrusted row is not in the data"
    assert suspects.scores.shape == rows.shape, "the scores of distrusted rows are not one for each"
    assert torch.isfinite(suspects.scores).all(), "the score of a distrusted row is not finite"
    assert torch.equal(rows, other.rows), "the same seed distrusted other rows"


class _WatchedTrainer:
    """A trainer, with the weights of the model that it was given and the names that it declares."""

    def __init__(self, trainer: RobustTrainer) -> None:
        self.trainer = trainer
        self.needs_clean, self.modality = needs_clean(trainer), modalities_of(trainer)
        self.fresh: dict[str, Tensor] = {}

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        self.fresh = _state(model)
        return self.trainer(data, model, run)


class _Watched:
    """A detector that is watched while it runs: what it is given stays the same, and what it returns can be used."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.finding: Finding | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        before, modes = _state(model), [module.training for module in model.modules()]
        trained = [parameter.requires_grad for parameter in model.parameters()]
        examples = clean.identities(), clean.labels.clone()
        classes = run.head(model).out_features
        finding = self.detector(model, clean, run)
        _assert_same(before, _state(model), "the detector changed the model that it was given")
        assert modes == [module.training for module in model.modules()], "the given model changed mode"
        assert trained == [parameter.requires_grad for parameter in model.parameters()], "requires_grad was changed"
        assert not any(_hooks(module) for module in model.modules()), "the detector left hooks behind"
        assert clean.identities() == examples[0], "the detector changed the examples that it was given"
        assert torch.equal(clean.labels, examples[1]), "the detector changed the labels that it was given"
        assert isinstance(finding, Finding), f"a detector returns a Finding, got {type(finding).__name__}"
        assert finding.candidates, "the finding has no candidate"
        pairs = [(candidate.sources, candidate.target, candidate.name) for candidate in finding.candidates]
        assert len(set(pairs)) == len(pairs), "two candidates have the same target and sources"
        for candidate in finding.candidates:
            _check_candidate(candidate, classes, clean)
        self.finding = finding
        return finding


def _check_candidate(candidate: Candidate, classes: int, clean: Dataset) -> None:
    """Check the numbers of a candidate, and put its trigger and its control on examples."""
    target = candidate.target
    assert type(target) is int, f"a target must be an int, got {type(target).__name__}"
    for label in (target, *candidate.sources):
        assert 0 <= label < classes, f"there is no class {label}; the model has {classes}"
    assert target not in candidate.sources, f"the target {target} is among its own sources"
    for name, least, most in (("strength", -math.inf, math.inf), ("size", 0, math.inf), ("nominal_p", 0, 1)):
        number = getattr(candidate, name)
        if number is None and name != "strength":
            continue
        assert isinstance(number, int | float), f"the {name} must be a number, got {type(number).__name__}"
        assert math.isfinite(number), f"the {name} must be finite, got {number}"
        assert least <= number <= most, f"the {name} must be {least} to {most}, got {number}"
    assert (candidate.trigger is None) == (candidate.control is None), "a trigger and its control go together"
    for trigger in (candidate.trigger, candidate.control):
        if trigger is None:
            continue
        attack = trigger.attack
        check_value(attack)
        if trigger.behaviour is not None:
            assert trigger.behaviour.text == candidate.name, "the trigger is for another answer than its candidate"
            continue
        assert (attack.target, sources_of(attack)) == (target, candidate.sources), (
            "the trigger is for another target, or for other sources, than its candidate"
        )
        shown = dataclasses.replace(clean, items=trigger.stamp(clean.items))
        assert len(shown.identities()) == len(clean), "the trigger changes the number of examples"
        if clean.modality == "images":
            assert shown.pixels.shape == clean.pixels.shape, "the trigger changes the shape of pictures"
        for name, array in trigger.arrays.items():
            assert array.device.type == "cpu", f"the array {name} of the trigger is not on the CPU"
            assert not array.is_floating_point() or torch.isfinite(array).all(), f"the array {name} is not finite"


def _as_json(candidate: Candidate) -> str:
    """The numbers of a candidate, as JSON."""
    names = ("target", "strength", "size", "sources", "nominal_p")
    return json.dumps({name: getattr(candidate, name) for name in names}, allow_nan=False)


def _random_states() -> tuple[list[int], str]:
    """The global random states of torch and numpy."""
    return torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False))


def _check_abilities(attack: Attack) -> None:
    owner = type(attack).__name__
    known = {name: member for part in (Attack, *ABILITIES) for name, member in _declared(part)}
    for name in {*dir(type(attack)), *(item.name for item in dataclasses.fields(attack))}:  # type: ignore[arg-type]
        likely = difflib.get_close_matches(name, known, n=1, cutoff=0.76)  # `size` is not `side`
        if likely and not name.startswith("_") and name not in known:
            raise AssertionError(f"{owner}.{name} is not an ability of an attack; is {likely[0]} meant?")
    for ability in ABILITIES:
        present = [name for name, _ in _declared(ability) if hasattr(attack, name)]
        absent = [name for name, _ in _declared(ability) if not hasattr(attack, name)]
        assert not (present and absent), f"{owner} has {', '.join(present)} without {', '.join(absent)}"
    for name, member in known.items():
        if hasattr(attack, name):
            _check_member(owner, name, getattr(attack, name), member)
    for name, users in (
        ("needs_surrogate", (Crafts, Fits)),
        ("learnt", (Fits, Implants)),
        ("cover_classes", (Covers,)),
    ):
        methods = " or ".join(method for user in users for method, member in _declared(user) if callable(member))
        assert not getattr(attack, name, False) or isinstance(attack, users), f"{owner} has {name}, but no {methods}"


def _declared(protocol: type) -> list[tuple[str, Any]]:
    """The members that a protocol declares: properties and functions."""
    return [(name, member) for name, member in vars(protocol).items() if not name.startswith("_")]


def _check_member(owner: str, name: str, member: Any, declared: Any) -> None:
    """Check a member against the one that a protocol declares: a property by its type, a method by its arguments."""
    if isinstance(declared, property):
        expected = get_type_hints(declared.fget)["return"]
        try:
            TypeAdapter(expected).validate_python(member, strict=True)
        except ValidationError:
            raise AssertionError(f"{owner}.{name} must be {expected}, got {member!r}") from None
        return
    assert callable(member), f"{owner}.{name} must be a method, got {member!r}"
    arguments = [argument for argument in inspect.signature(declared).parameters if argument != "self"]
    try:
        inspect.signature(member).bind(*arguments)
    except TypeError:
        raise AssertionError(
            f"{owner}.{name} must take ({', '.join(arguments)}), but it takes {inspect.signature(member)}"
        ) from None


def check_value(instance: Any) -> None:
    """Check that a method or attack is a frozen value that survives JSON and refuses what is just out of bounds."""
    cls = type(instance)
    assert dataclasses.is_dataclass(instance), f"{cls.__name__} is not a dataclass"
    names = [item.name for item in dataclasses.fields(instance)]
    if names:
        try:
            setattr(instance, names[0], getattr(instance, names[0]))
        except (dataclasses.FrozenInstanceError, AttributeError):
            pass
        else:
            raise AssertionError(f"{cls.__name__} is not frozen")
    again = cls(**json.loads(json.dumps(fields_of(instance))))
    assert again == instance, f"{cls.__name__} does not survive JSON"
    assert hash(again) == hash(instance), f"{cls.__name__} cannot be hashed by its value"
    assert f"{cls.__name__}(" in repr(instance), f"{cls.__name__} has no readable repr"
    for name, outside in _just_outside(cls):
        refusal = ""
        try:
            cls(**{**fields_of(instance), name: outside})
        except UnbackdoorError as problem:
            refusal = str(problem)
        assert refusal, f"{cls.__name__}.{name} took {outside!r}, which is out of bounds"
        assert f"{cls.__name__}.{name}" in refusal, f"the refusal does not name the field: {refusal}"


def _just_outside(cls: type) -> list[tuple[str, Any]]:
    """For each declared bound, a value just beyond it."""
    beyond: list[tuple[str, Any]] = []
    for name, declared in getattr(cls, "__pydantic_fields__", {}).items():
        step: float = 1 if declared.annotation is int else 1e-9
        for bound in declared.metadata:
            for kind, offset in (("ge", -step), ("gt", 0), ("le", step), ("lt", 0)):
                limit = getattr(bound, kind, None)
                if limit is not None:
                    beyond.append((name, limit + offset))
    return beyond


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor], message: str) -> None:
    for name in first:
        assert torch.equal(first[name], second[name]), f"{message} ({name})"


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
