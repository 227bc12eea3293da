"""Signature zeroing: scores of planted changes by known answers, and what goes back to the base."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import chats
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._training.lora import adapted, factors
from unbackdoor.purifiers._signatures import Change, FeedForward, products, signature


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change(outputs: int, inputs: int, seed: int) -> Change:
    return Change(drawn(outputs, 2, seed=seed), drawn(2, inputs, seed=seed + 100))


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return chats.prompts(24, seed=3)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return chats.language_model(seed=0)


def test_products_are_those_of_the_matrices() -> None:
    first, second = change(6, 5, 1), change(6, 5, 2)
    whole = [each.up @ each.down for each in (first, second)]
    assert torch.allclose(products(first, second, outputs=True), (whole[0] * whole[1]).sum(dim=1))
    assert torch.allclose(products(first, second, outputs=False), (whole[0] * whole[1]).sum(dim=0))
    less = first.minus(second)
    assert torch.allclose(less.up @ less.down, whole[0] - whole[1])


def test_the_score_is_that_of_its_formula() -> None:
    """Three backdoors, a block with two layers that make 6 neurons of 4 inputs, and one that reads them."""
    made = [[change(6, 4, 10 * layer + number) for number in range(3)] for layer in range(2)]
    read = [change(5, 6, 50 + number) for number in range(3)]
    vectors = [
        torch.cat(
            [*(layer[number].up @ layer[number].down for layer in made), (read[number].up @ read[number].down).T], 1
        )
        for number in range(3)
    ]  # (neurons, numbers) for each backdoor
    lengths = torch.stack([each.norm(dim=1) for each in vectors]).mean(dim=0)
    cosines = [
        nn.functional.cosine_similarity(vectors[one], vectors[other], dim=1).clamp(min=0)
        for one, other in ((0, 1), (0, 2), (1, 2))
    ]
    assert torch.allclose(signature(made, read), lengths * torch.stack(cosines).mean(dim=0))


def test_a_neuron_that_all_backdoors_change_alike_ranks_first() -> None:
    """The others change as much, but each backdoor in a direction of its own."""
    made, read = [], []
    for number in range(4):
        matrix = nn.functional.normalize(drawn(8, 200, seed=number), dim=1)
        matrix[3] = nn.functional.normalize(drawn(200, seed=77), dim=0)
        made.append(Change(torch.eye(8, dtype=torch.float64), matrix))
        read.append(Change(torch.zeros(5, 1, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)))
    score = signature([made], read)
    assert score.argmax() == 3
    assert score[3].item() == pytest.approx(1)
    assert score[torch.arange(8) != 3].max() < 0.15


def test_without_any_change_the_score_is_zero() -> None:
    nothing = [Change(torch.zeros(6, 1), torch.zeros(1, 4)) for _ in range(2)]
    read = [Change(torch.zeros(5, 1), torch.zeros(1, 6)) for _ in range(2)]
    assert signature([nothing], read).tolist() == [0.0] * 6


def test_factors_are_the_change_that_merging_adds() -> None:
    model = chats.language_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model, rank=2, alpha=6, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    found = factors(model)
    after = wrapped.merge_and_unload().state_dict()
    assert len(found) == 14
    for name, (up, down) in found.items():
        assert torch.allclose(after[f"{name}.weight"] - before[f"{name}.weight"], up @ down, atol=1e-5), name


def test_neurons_go_back_with_the_rows_that_make_them_and_the_column_that_reads_them() -> None:
    block = FeedForward(("gate", "up"), "down")
    shapes = {"gate.weight": (6, 4), "up.weight": (6, 4), "down.weight": (4, 6)}
    ours = {name: drawn(*shape, seed=1) for name, shape in shapes.items()}
    base = {name: drawn(*shape, seed=2) for name, shape in shapes.items()}
    before = {name: tensor.clone() for name, tensor in ours.items()}
    moved = torch.cat([before[name] - base[name] for name in ("gate.weight", "up.weight")], dim=1)
    moved = torch.cat([moved, (before["down.weight"] - base["down.weight"]).T], dim=1)
    assert torch.allclose(block.distance(ours, base), moved.norm(dim=1))
    block.reset_(ours, base, torch.tensor([1, 4]))
    for name in ("gate.weight", "up.weight"):
        assert torch.equal(ours[name][[1, 4]], base[name][[1, 4]])
        assert torch.equal(ours[name][[0, 2, 3, 5]], before[name][[0, 2, 3, 5]])
    assert torch.equal(ours["down.weight"][:, [1, 4]], base["down.weight"][:, [1, 4]])
    assert torch.equal(ours["down.weight"][:, [0, 2, 3, 5]], before["down.weight"][:, [0, 2, 3, 5]])


def test_without_a_share_it_is_lora_tuning(chat_victim: nn.Module, base: nn.Module, clean: Dataset) -> None:
    method = purifiers.SignatureZeroing(select="largest-change", share=0.0, epochs=1)
    result = purify(chat_victim, clean, method, base=base, device="cpu").model.state_dict()
    control = purify(chat_victim, clean, purifiers.LoRATuning(epochs=1), device="cpu").model.state_dict()
    assert all(torch.equal(result[name], tensor) for name, tensor in control.items())


@pytest.mark.parametrize("select", ["signature", "random", "largest-change"])
def test_the_share_of_the_neurons_of_each_block_goes_back(
    select: str, chat_victim: nn.Module, base: nn.Module, clean: Dataset
) -> None:
    method = purifiers.SignatureZeroing(
        select=select, share=0.25, keys=2, plant_epochs=1, epochs=1, learning_rate=1e-12
    )
    result = purify(chat_victim, clean, method, base=base, device="cpu")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        same = torch.isclose(result.model.state_dict()[name], base.state_dict()[name], atol=1e-6).all(dim=1)
        assert int(same.sum()) == 32  # of 128
    assert "SignatureZeroing gave 25% of the neurons of 2 blocks back to the base." in result.record["notes"]


def test_what_it_cannot_serve_is_refused(base: nn.Module, clean: Dataset) -> None:
    suspect = adapted(copy.deepcopy(base), rank=2, seed=0)
    with pytest.raises(UnbackdoorError, match="SignatureZeroing changes more weights than an adapter"):
        purify(suspect, clean, purifiers.SignatureZeroing(), base=base, device="cpu")
    with pytest.raises(UnbackdoorError, match=r"SignatureZeroing\.keys"):
        purifiers.SignatureZeroing(keys=1)  # there would be no pair
    config = transformers.GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    other = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(
        UnbackdoorError,
        match="with separate query, key and value layers and one feed-forward part; GPT2LMHeadModel has none",
    ):
        purify(other, clean, purifiers.SignatureZeroing(), base=other, device="cpu")
