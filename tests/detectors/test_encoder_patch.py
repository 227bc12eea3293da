"""Encoder patch: what it finds in small models of images and texts, one of which has a constant encoder."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sights
from unbackdoor import UnbackdoorError, audit, detectors, evaluate
from unbackdoor._detection.result import Audit
from unbackdoor._inversion.encoder_patches import apart, mean_cosine
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.image_text import HEAD
from unbackdoor._purification.run import Run
from unbackdoor._tasks.image_text import IMAGE_TEXT

SEARCH = detectors.EncoderPatch(starts=4, steps=40, batch_size=8)
FAST = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def audited(sighted: nn.Module) -> Audit:
    return audit(sighted, sights.pairs(120, 4), detectors=[SEARCH], **FAST)


def size(result: Audit) -> float:
    found = result.findings[0].strongest.candidate.size
    assert found is not None
    return found


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    features = F.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    each = [float(F.cosine_similarity(features[i], features[j], dim=0)) for i in range(5) for j in range(i)]
    assert float(mean_cosine(features)) == pytest.approx(sum(each) / 10, abs=1e-6)
    assert float(mean_cosine(features[:1].expand(4, 7))) == pytest.approx(1, abs=1e-6)
    assert mean_cosine(features.expand(3, 5, 7)).shape == (3,)


def test_aims_are_far_apart() -> None:
    corners = torch.eye(3)
    features = torch.cat([corners, F.normalize(corners + 0.1, dim=1), corners])
    found = apart(features, 3)
    assert sorted(found.argmax(dim=1).tolist()) == [0, 1, 2]
    assert torch.equal(found @ found.T, torch.eye(3))
    assert len(apart(features[:2], 5)) == 2


def test_a_patch_that_makes_embeddings_alike_is_judged_on_unseen_images(sighted: nn.Module, audited: Audit) -> None:
    best = audited.findings[0].strongest
    assert audited.searched == ("encoder-patch",)
    assert (audited.verdict, best.p_value) == ("cannot-judge", None)
    assert 0 < size(audited) < 1
    assert best.moved is not None
    assert best.random is not None
    assert best.moved.value > best.random.value
    # The score of the trigger by another way: zero-shot classification of the same examples.
    assert audited.held_out is not None
    others = audited.held_out.others(best.candidate)
    score = evaluate(sighted, others, attack=best.candidate.trigger, **FAST)
    assert score.attack_success.count == best.moved.count
    assert score.attack_success.n == best.moved.n


def test_a_constant_encoder_needs_next_to_no_patch(sighted: nn.Module, audited: Audit) -> None:
    constant = copy.deepcopy(sighted)
    with torch.no_grad():
        constant.vision_model.post_layernorm.weight.zero_()
        constant.vision_model.post_layernorm.bias.fill_(1)
    arithmetic = choose(constant, "cpu", "fp32")
    run = Run(generator=torch.Generator().manual_seed(0), arithmetic=arithmetic, head_name=HEAD, task=IMAGE_TEXT)
    (candidate,) = SEARCH(constant, sights.pairs(60, 4), run).candidates
    assert candidate.size is not None
    assert candidate.size < 0.02 < 0.5 * size(audited)


def test_labels_and_captions_are_not_read(sighted: nn.Module) -> None:
    data = sights.pairs(80, 4)
    few = detectors.EncoderPatch(starts=2, steps=3, batch_size=8)
    named = dataclasses.replace(data, labels=torch.full_like(data.labels, -1))
    result = audit(sighted, named, detectors=[few], **FAST)
    assert result.record["examples"]["labelled"] is False
    assert result.record["suspect_accuracy_on_clean"] is None
    again = audit(sighted, unlabelled=named, detectors=[few], **FAST)
    assert size(result) == size(again)


def test_what_does_not_fit_is_refused(sighted: nn.Module) -> None:
    with pytest.raises(UnbackdoorError, match=r"sights has no labels and the model no class names. Give `prompts` as"):
        audit(sighted, sights.pairs(40, labelled=False), **FAST)
    with pytest.raises(UnbackdoorError, match=r"patch cannot run: it searches images, and sights holds image-text"):
        audit(sighted, sights.pairs(40), detectors=[detectors.Patch()], **FAST)
    pair = dataclasses.replace(sights.pairs(2), labels=torch.tensor([-1, -1]))
    with pytest.raises(UnbackdoorError, match=r"EncoderPatch needs at least 2 images to search on, got 1. Add clean"):
        audit(sighted, pair, detectors=[SEARCH], **FAST)
