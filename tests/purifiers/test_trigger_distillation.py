"""The project's variant of Neural Cleanse against a second implementation that works from its formula alone."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._inversion.masks import MaskedPatterns, MaskSearch
from unbackdoor.purifiers import trigger_distillation

EPOCHS, BATCH, RATE, SHARE, TAUGHT, SEED = 2, 16, 0.05, 0.2, 0.7, 5


def by_the_formula(model: SmallCNN, data: Dataset, *, rho: float) -> None:
    """SGD with momentum 0.9, a cosine per epoch, and the gradient of both cross-entropies at the probed point."""
    generator = torch.Generator().manual_seed(SEED)
    teacher = copy.deepcopy(model).eval()
    weights, suspect = list(model.parameters()), list(teacher.parameters())
    velocity = [torch.zeros_like(weight) for weight in weights]
    model.train()
    for epoch in range(EPOCHS):
        rate = RATE * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for rows in torch.randperm(len(data), generator=generator).split(BATCH):
            x, y = data.items[rows].double() / 255, data.labels[rows]
            with torch.no_grad():
                answers = teacher((x - 0.25) / 0.5).softmax(1)
            n, carrying = len(rows), int(SHARE * len(rows) + 1)
            for place in range(carrying):
                x[place * n // carrying] = 1 - x[place * n // carrying]
            kept = [weight.detach().clone() for weight in weights]
            norm = math.sqrt(sum(float(((s.detach() - w) ** 2).sum()) for s, w in zip(suspect, kept, strict=True)))
            with torch.no_grad():
                for weight, s, w in zip(weights, suspect, kept, strict=True):
                    weight.copy_(w + rho * (s - w) / (norm + 1e-12))
            scores = model((x - 0.25) / 0.5)
            taught = -(answers * scores.log_softmax(1)).sum(1).mean()
            loss = TAUGHT * taught + (1 - TAUGHT) * F.cross_entropy(scores, y)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, w, v, g in zip(weights, kept, velocity, gradients, strict=True):
                    v.mul_(0.9).add_(g)
                    weight.copy_(w - rate * v)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_the_weights_are_those_of_the_formula(
    rho: float, small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trigger is given, the negative of the picture, and nothing is distorted; both are tested elsewhere."""
    monkeypatch.setattr(
        MaskSearch, "outliers", lambda *_: (MaskedPatterns(torch.ones(1), torch.ones(1)), torch.tensor([0]))
    )
    monkeypatch.setattr(trigger_distillation, "stamp", lambda *_: lambda pixels: 1 - pixels)
    monkeypatch.setattr(Dataset, "distorted", lambda data: data)
    encode = dataclasses.replace(digits.encode, mean=(0.25,), std=(0.5,))
    data = dataclasses.replace(digits.select(range(50)), encode=encode)
    model = small_cnn.double()
    method = purifiers.TriggerDistillation(
        taught=TAUGHT, share=SHARE, rho=rho, epochs=EPOCHS, learning_rate=RATE, batch_size=BATCH
    )
    found = purify(model, data, method, seed=SEED, device="cpu", precision="fp32").model
    by_the_formula(model, data, rho=rho)
    for (name, one), (_, other) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_a_planted_trigger_is_unlearned_and_accuracy_stays(backdoored: tuple, digits: Dataset) -> None:
    model, stamped, test = backdoored
    result = purify(model, digits.select(range(300)), purifiers.TriggerDistillation(), seed=0, device="cpu")
    assert result.record["notes"][0].startswith("Neural Cleanse: outliers 3")
    labels = digits.labels[1000:1400]
    with torch.no_grad():
        before, after = ((each(test).argmax(1) == labels).double().mean() for each in (model, result.model))
        assert (model(stamped).argmax(1) == 3).double().mean() > 0.9
        assert (result.model(stamped).argmax(1) == 3).double().mean() < 0.2
    assert after > before - 0.02


def test_the_teacher_is_the_suspect_as_it_came(backdoored: tuple, digits: Dataset) -> None:
    """Without a trigger and without labels there is nothing to learn but the suspect's own answers."""
    model, stamped, _ = backdoored
    method = purifiers.TriggerDistillation(taught=1.0, share=0.0, epochs=2)
    result = purify(model, digits.select(range(300)), method, seed=0, device="cpu")
    with torch.no_grad():
        assert (result.model(stamped).argmax(1) == 3).double().mean() > 0.5


def test_without_an_outlier_it_is_scale_invariant_fst(
    small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = (MaskedPatterns(torch.ones(10), torch.ones(10)), torch.tensor([], dtype=torch.int64))
    monkeypatch.setattr(MaskSearch, "outliers", lambda *_: none)
    data = digits.select(range(60))
    result = purify(small_cnn, data, purifiers.TriggerDistillation(batch_size=16), seed=3)
    other = purify(small_cnn, data, purifiers.ScaleInvariantFST(), seed=3)
    assert result.record["notes"] == [
        "TriggerDistillation: no trigger to unlearn; the features are shifted by scale-invariant-fst.",
        *other.record["notes"],
    ]
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


def test_texts_are_refused(reviews: Dataset, text_victim: nn.Module) -> None:
    message = r"^TriggerDistillation searches pixels for a trigger, but .* holds text\. Try pam,"
    with pytest.raises(UnbackdoorError, match=message):
        purify(text_victim, reviews, purifiers.TriggerDistillation())
