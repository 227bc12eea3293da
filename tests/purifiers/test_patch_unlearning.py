"""Patch unlearning: its loss by hand, what it leaves alone, and a patch that works before and not afterwards."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import sights
import toys
from unbackdoor import UnbackdoorError, detectors, evaluate, purifiers, purify
from unbackdoor._models.image_text import image_features
from unbackdoor._tasks.image_text import IMAGE_TEXT

SEARCH = {"starts": 4, "steps": 40}
METHOD = purifiers.PatchUnlearning(**SEARCH, epochs=15, learning_rate=3e-3, batch_size=16)
FAST = {"device": "cpu", "precision": "fp32"}


@torch.no_grad()
def test_the_loss_is_that_of_its_formula() -> None:
    model, data = sights.clip().eval(), sights.pairs(8)
    run = toys.a_run(model=model, modality="image-text", task=IMAGE_TEXT)
    images, stamped = data.inputs(slice(0, 3)).pixels, data.inputs(slice(3, 6)).pixels
    answers = image_features(sights.clip(1).eval(), images)
    by_hand = 0.0
    for seen in (image_features(model, images), image_features(model, stamped)):
        by_hand += sum(1 - float(seen[row] @ answers[row]) for row in range(3)) / 3
    assert float(METHOD.loss(model, images, stamped, answers, run)) == pytest.approx(by_hand, rel=1e-5)


def test_the_text_tower_stays_bit_for_bit_and_all_weights_can_be_tuned_again(sighted: nn.Module) -> None:
    result = purify(sighted, sights.pairs(64, 4), METHOD, **FAST)
    before = sighted.state_dict()
    changed = {name for name, weight in result.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"vision_model", "visual_projection"}
    assert all(weight.requires_grad for weight in result.model.parameters())
    assert result.record["warnings"] == []
    assert sum("patches of" in note for note in result.record["notes"]) == METHOD.rounds


@pytest.mark.thorough
def test_neither_labels_nor_captions_are_read(sighted: nn.Module) -> None:
    data = sights.pairs(64, 4)
    other = replace(data.pairs, captions=sights.pairs(64, 5).pairs.captions)
    bare = replace(data, items=other, labels=torch.full_like(data.labels, -1), classes=None)
    mine, same = (purify(sighted, each, METHOD, **FAST).model.state_dict() for each in (data, bare))
    assert all(torch.equal(weight, same[name]) for name, weight in mine.items())


def test_one_pair_is_too_few(sighted: nn.Module) -> None:
    with pytest.raises(UnbackdoorError, match=r"PatchUnlearning needs at least 2 images to search on, got 1\. Add"):
        purify(sighted, sights.pairs(1), METHOD, **FAST)


def test_a_patch_that_works_before_works_no_longer(sighted: nn.Module) -> None:
    """The patch is of another search, on other pictures."""
    run = toys.a_run(model=sighted, modality="image-text", task=IMAGE_TEXT, seed=7)
    found = detectors.EncoderPatch(**SEARCH)(copy.deepcopy(sighted), sights.pairs(60, 5), run).candidates
    test, purified = sights.pairs(120, 9), purify(sighted, sights.pairs(80, 4), METHOD, **FAST).model
    scores = [[evaluate(model, test, attack=each.trigger, **FAST) for each in found] for model in (sighted, purified)]
    before, after = (max(score.attack_success.value for score in of_one) for of_one in scores)
    assert before > 0.8
    assert after < before / 2
    assert scores[1][0].zero_shot_accuracy.value > scores[0][0].zero_shot_accuracy.value - 0.05
