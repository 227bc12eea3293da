"""SAU against a second implementation in float64 that goes through the examples one by one."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fixtures import SmallCNN
from unbackdoor import Dataset, purifiers, purify
from unbackdoor.purifiers.sau import search_loss, unlearning

SIZE, STEPS, BOUND, ADVERSARIAL, SHARED, RATE, SEED = 20, 3, 0.3, 0.05, 1.5, 0.002, 7


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen and Shannon's, by entropies: H((p + q) / 2) - (H(p) + H(q)) / 2."""

    def entropy(r: Tensor) -> Tensor:
        return -sum(part * part.log() for part in r)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def search_by_hand(mine: Tensor, theirs: Tensor, before: list[Tensor], labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, label in enumerate(labels):
        p, q = mine[row].softmax(0), theirs[row].softmax(0)
        kept = [p.argmax() == before[0][row], q.argmax() == before[1][row]]
        if any(kept) or p.argmax() != q.argmax():
            total = total + divergence(p, q)
        for keeps, answer in zip(kept, (p, q), strict=True):
            if keeps:
                total = total + ADVERSARIAL * answer[label].log() / 2
    return total / len(labels)


def answers(rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mine, theirs = (2 * torch.randn(rows, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return mine, theirs, torch.randint(4, (rows,), generator=generator)


def test_what_the_search_minimises() -> None:
    mine, theirs, labels = answers()
    before = [labels, labels.roll(1)]
    expected = search_by_hand(mine, theirs, before, labels)
    assert torch.allclose(search_loss([mine, theirs], before, labels, ADVERSARIAL), expected, atol=1e-12)


def test_an_example_that_shares_a_wrong_answer_is_done() -> None:
    scores = torch.tensor([[5.0, 0.0, 0.0]])
    value = search_loss([scores, 2 * scores], [torch.tensor([1])] * 2, torch.tensor([1]), 1.0)
    assert value == 0


def test_what_is_unlearned() -> None:
    mine, theirs, labels = answers()
    fooled = theirs.argmax(dim=1)
    counts = fooled != labels
    expected = -sum((1 - mine[row].softmax(0)[fooled[row]]).log() for row in range(12) if counts[row]) / 12
    assert torch.allclose(unlearning(mine, fooled, counts), expected, atol=1e-12)


def test_a_sure_answer_is_unlearned_without_overflow() -> None:
    scores = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    loss = unlearning(scores, torch.tensor([0]), torch.tensor([True]))
    loss.backward()
    assert loss.item() == pytest.approx(200 - math.log(1 + math.exp(-5)), rel=1e-5)
    assert scores.grad is not None
    assert scores.grad[0, 0] == 1


def by_the_formula(model: SmallCNN, data: Dataset, *, train_mode: bool) -> None:
    generator, parameters = torch.Generator().manual_seed(SEED), list(model.parameters())
    suspect = copy.deepcopy(model).eval()
    bound, steps = BOUND / data.encode.std[0], -(-len(data) // SIZE)
    adam = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    for batch in data.batches(SIZE, generator=generator):
        x, y = batch.inputs.double(), batch.labels
        model.eval()
        before = [model(x).argmax(1), suspect(x).argmax(1)]
        d = torch.full_like(x, bound)
        for _ in range(STEPS):
            d = d.detach().requires_grad_(True)
            slope = torch.autograd.grad(search_by_hand(model(x + d), suspect(x + d), before, y), d)[0]
            d = torch.minimum(torch.maximum(d.detach() - bound * slope.sign(), -bound + 0 * d), bound + 0 * d).detach()
        model.train(train_mode)
        p, mine = model(x).softmax(1), model(x + d).softmax(1)
        wrong = suspect(x + d).argmax(1)
        loss = torch.zeros((), dtype=torch.float64)
        for row, label in enumerate(y):
            loss = loss - p[row, label].log()
            if wrong[row] != label and wrong[row] != before[1][row]:
                loss = loss - SHARED * (1 - mine[row, wrong[row]]).log()
        adam.zero_grad()
        (loss / len(y)).backward()
        adam.step()
        schedule.step()


@pytest.mark.parametrize("train_mode", [False, True])
def test_the_weights_are_those_of_the_formula(train_mode: bool, small_cnn: SmallCNN, digits: Dataset) -> None:
    model, data = small_cnn.double(), digits.select(range(40))
    method = purifiers.SAU(
        bound=BOUND,
        steps=STEPS,
        adversarial=ADVERSARIAL,
        shared=SHARED,
        train_mode=train_mode,
        epochs=1,
        learning_rate=RATE,
        batch_size=SIZE,
    )
    result = purify(model, data, method, seed=SEED, device="cpu").model.state_dict()
    by_the_formula(model, data, train_mode=train_mode)
    for name, expected in model.state_dict().items():
        assert torch.allclose(result[name].double(), expected.double(), rtol=0, atol=1e-7), name
