"""I-BAU: its derivative against closed forms, the whole method against a plain second implementation in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, purifiers, purify
from unbackdoor.purifiers.i_bau import implicit_gradient


def quadratic() -> tuple[Tensor, ...]:
    """G = d'Ad / 2 - d'B theta, so d(theta) = A^-1 B theta; L = |d - c|^2 / 2 + |theta|^2 / 2; A between 0.5 and 2."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    a = turn @ torch.diag(torch.linspace(0.5, 2, 5, dtype=torch.float64)) @ turn.T
    b, c, theta = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5,), (3,)))
    return a, b, c, theta.requires_grad_(True)


def derivative(a: Tensor, b: Tensor, c: Tensor, theta: Tensor, d: Tensor, iterations: int) -> Tensor:
    d = d.detach().requires_grad_(True)
    (made,) = implicit_gradient(
        lambda: d @ a @ d / 2 - d @ b @ theta,
        lambda: ((d - c) ** 2).sum() / 2 + (theta**2).sum() / 2,
        d,
        [theta],
        iterations=iterations,
        step=0.5,
    )
    return made


def test_many_iterations_give_the_implicit_derivative_in_closed_form() -> None:
    a, b, c, theta = quadratic()
    inverse = torch.linalg.inv(a)
    d = inverse @ b @ theta
    exact = theta + (inverse @ b).T @ (d - c)  # of |A^-1 B theta - c|^2 / 2 + |theta|^2 / 2
    assert torch.allclose(derivative(a, b, c, theta, d, iterations=200), exact, atol=1e-12)
    assert not torch.allclose(derivative(a, b, c, theta, d, iterations=2), exact, atol=1e-2)


def test_few_iterations_give_the_first_terms_of_the_series() -> None:
    a, b, c, theta = quadratic()
    d = torch.ones(5, dtype=torch.float64)
    back = torch.eye(5, dtype=torch.float64) - 0.5 * a
    v = sum(torch.linalg.matrix_power(back, k) @ (d - c) for k in range(4))
    assert torch.allclose(derivative(a, b, c, theta, d, iterations=4), theta + 0.5 * b.T @ v, atol=1e-12)


SIZE, SHARE, BOUND, STEP, DECAY, RATE, SEED = 20, 0.5, 0.1, 0.3, 0.01, 0.002, 7


def by_the_formula(model: SmallCNN, data: Dataset, rounds: int, iterations: int) -> None:
    """With whole matrices of second derivatives; batches, draws and torch's AdamW are shared with the product."""
    generator, parameters = torch.Generator().manual_seed(SEED), list(model.parameters())
    unit, steps = 1 / data.encode.std[0], -(-len(data) // SIZE)
    adam = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=rounds * steps)
    model.eval()

    def g(d: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return DECAY * (d**2).sum() - F.cross_entropy(model(x + unit * d.view(1, 1, 8, 8)), y)

    for _ in range(rounds):
        d, radius = torch.zeros(64, dtype=torch.float64), BOUND * 8.0
        for batch in data.batches(SIZE, generator=generator):
            d.requires_grad_(True)
            slope = torch.autograd.grad(g(d, batch.inputs.double(), batch.labels), d)[0]
            d = d.detach() - 2 * radius / steps * slope / slope.norm()
            d = d * min(1.0, radius / d.norm().item())
        for batch in data.batches(SIZE, generator=generator):
            x, y = batch.inputs.double(), batch.labels
            some = (torch.rand(len(y), generator=generator) < SHARE).double()[:, None, None, None]
            d.requires_grad_(True)
            loss = F.cross_entropy(model(x + unit * d.view(1, 1, 8, 8) * some), y)
            along, *direct = torch.autograd.grad(loss, [d, *parameters])
            slope = torch.autograd.grad(g(d, x, y), d, create_graph=True)[0]  # (64,)
            second = torch.stack([torch.autograd.grad(one, d, retain_graph=True)[0] for one in slope])  # (64, 64)
            back = torch.eye(64, dtype=torch.float64) - STEP * second
            v = sum(torch.linalg.matrix_power(back.T, k) @ along for k in range(iterations))
            mixed = torch.autograd.grad((slope * v).sum(), parameters, materialize_grads=True)
            for one, first, other in zip(parameters, direct, mixed, strict=True):
                one.grad = first - STEP * other
            adam.step()
            schedule.step()


def test_the_weights_are_those_of_the_formula(small_cnn: SmallCNN, digits: Dataset) -> None:
    model, data = small_cnn.double(), digits.select(range(40))
    method = purifiers.IBAU(
        rounds=2,
        iterations=3,
        step=STEP,
        decay=DECAY,
        bound=BOUND,
        share=SHARE,
        learning_rate=RATE,
        batch_size=SIZE,
    )
    result = purify(model, data, method, seed=SEED, device="cpu").model.state_dict()
    by_the_formula(model, data, rounds=2, iterations=3)
    for name, expected in model.state_dict().items():
        assert torch.allclose(result[name], expected, rtol=0, atol=1e-8), name
