"""CleanCLIP: its loss by hand, and what is left of it without a weight."""

import random

import pytest
import torch
from torch.nn import functional as F

import sights
import toys
from unbackdoor import purifiers, purify
from unbackdoor._models.calling import logits
from unbackdoor._models.image_text import image_features, text_features
from unbackdoor._tasks.image_text import IMAGE_TEXT
from unbackdoor._training.contrastive import contrastive
from unbackdoor.purifiers.cleanclip import edited

SETTINGS = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3}


def test_without_weight_it_is_contrastive_fine_tuning() -> None:
    model, data = sights.clip(), sights.pairs(64)
    inputs = data.inputs(slice(None))
    before, mine, plain = (
        logits(each, inputs).detach()
        for each in (
            model,
            *(
                purify(model, data, method, seed=3, device="cpu", precision="fp32").model
                for method in (purifiers.CleanCLIP(weight=0.0, **SETTINGS), purifiers.FineTuning(**SETTINGS))
            ),
        )
    )
    assert torch.allclose(mine, plain, atol=1e-3)
    assert float((mine - before).abs().max()) > 0.1


@torch.no_grad()
def test_the_loss_is_that_of_its_formula() -> None:
    model, data = sights.clip().eval(), sights.pairs(10)
    method, run = purifiers.CleanCLIP(weight=0.7), toys.a_run(model=model, modality="image-text", task=IMAGE_TEXT)
    rows = torch.tensor([8, 1, 4, 3, 0])  # 8, 4 and 0 are of one class and may share a caption
    images = data.inputs(rows).pixels
    draws = (torch.Generator().manual_seed(5), random.Random(5))
    measured = method._loss(model, data, images, rows, run, *draws)

    again = data.distorted().augment(data.pairs.images[rows], torch.Generator().manual_seed(5))
    captions = [caption for (caption,) in data.pairs.captions[rows].strings]
    texts, words = list(dict.fromkeys(captions)), random.Random(5)
    copies = [edited(text, 0.1, words) for text in texts]

    def read(strings: list[str]) -> torch.Tensor:
        return text_features(model, data.encode.texts(data.encode.texts_alone(strings)))

    scale = model.logit_scale.exp()
    seen, copied = image_features(model, images), image_features(model, data.encode.images(again))
    expected = contrastive(scale * seen @ read(captions).T)
    within = F.cross_entropy(scale * seen @ copied.T, torch.arange(5))
    within += F.cross_entropy(scale * read(texts) @ read(copies).T, torch.arange(len(texts)))
    assert float(measured) == pytest.approx(float(expected + 0.7 * within / 2), rel=1e-5)


@pytest.mark.parametrize("text", ["one", "one two", "a photo of a small brown dog in the rain today"])
def test_an_edit_exchanges_leaves_out_or_repeats_words(text: str) -> None:
    draw = random.Random(0)
    lengths = set()
    for _ in range(40):
        words = edited(text, 0.1, draw).split()
        assert words
        assert set(words) <= set(text.split())
        lengths.add(len(words) - len(text.split()))
    assert lengths == ({1} if text == "one" else {-1, 0, 1})
