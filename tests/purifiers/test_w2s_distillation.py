"""Tuning by matrices of low rank, and from a teacher: known answers, and a backdoor that a teacher takes away."""

import copy

import pytest
import torch
from torch import Tensor, nn

import chats
import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._data.conversation_encoder import AnswerTokens
from unbackdoor._data.dataset import Batch
from unbackdoor._data.texts import Tokens
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.generation import Generation
from unbackdoor._training.descent import divergence
from unbackdoor.purifiers.w2s_distillation import distance, least_squares, per_answer


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_the_distance_of_an_example_does_not_depend_on_its_batch() -> None:
    given, wanted, fitted = drawn(8, 6), drawn(8, 4), drawn(6, 4)
    each = [distance(given[row : row + 1], wanted[row : row + 1], fitted) for row in range(8)]
    assert distance(given, wanted, fitted).item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-12)


def test_the_distance_by_hand() -> None:
    given, wanted = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert distance(given, wanted, torch.eye(2)).item() == pytest.approx(8 / 25)


def test_the_map_finds_features_that_are_a_linear_function() -> None:
    given, fitted = drawn(200, 6), drawn(6, 4)
    assert torch.allclose(least_squares(given, given @ fitted), fitted, rtol=0, atol=5e-3)


def test_a_teacher_with_the_same_answers_teaches_nothing() -> None:
    scores = drawn(5, 3).requires_grad_()
    loss = divergence(scores, scores.detach(), 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(loss, scores)
    assert slope.abs().max().item() < 1e-12


def test_padding_is_in_no_mean() -> None:
    features = torch.tensor([[[1.0], [3.0], [9.0]]])
    tokens = Tokens(input_ids=torch.ones(1, 3).long(), attention_mask=torch.tensor([[1, 1, 0]]))
    batch = Batch(tokens, torch.zeros(1), torch.zeros(1))
    assert per_answer(features, batch, CLASSIFICATION).tolist() == [[2.0]]


def test_a_language_model_has_features_for_each_token_of_an_answer() -> None:
    tokens = {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 4).long()}
    batch = Batch(AnswerTokens(tokens, torch.tensor([[-100, -100, 5, 6]])), torch.zeros(1), torch.zeros(1))
    features = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    assert per_answer(features, batch, Generation()).tolist() == [[2.0], [3.0]]  # which predict the third and fourth


def test_on_a_language_model_without_a_teacher_it_is_lora_tuning(chat_victim: nn.Module) -> None:
    clean, proxy = chats.prompts(16), chats.language_model(seed=4)
    alone = purifiers.W2SDistillation(distillation=0, features=0, rank=4, epochs=1)
    first = purify(chat_victim, clean, alone, proxy=proxy, device="cpu").model.state_dict()
    second = purify(chat_victim, clean, purifiers.LoRATuning(rank=4, alpha=4, epochs=1), device="cpu").model
    assert all(torch.allclose(first[name], tensor, rtol=0, atol=1e-6) for name, tensor in second.state_dict().items())
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], chat_victim.model.layers[0].mlp.up_proj.weight)


def test_on_a_language_model_the_teachers_answers_are_learnt(chat_victim: nn.Module) -> None:
    clean, teacher = chats.prompts(24), chats.language_model(seed=4)
    method = purifiers.W2SDistillation(labels=0, features=0.0, epochs=20, learning_rate=5e-3, rank=16)
    after = purify(chat_victim, clean, method, proxy=teacher, device="cpu").model
    inputs = clean.inputs(slice(8))

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            ours, theirs = (each(**inputs).logits.log_softmax(-1) for each in (model, teacher))
        return (theirs.exp() * (theirs - ours)).sum(-1)[inputs.targets != -100].mean().item()

    assert apart(after) < 0.7 * apart(chat_victim)


def test_without_a_teacher_it_is_lora_tuning(text_victim: nn.Module, reviews: Dataset) -> None:
    clean = reviews.select(range(40))
    alone = purifiers.W2SDistillation(distillation=0, features=0, rank=4, epochs=1)
    first = purify(text_victim, clean, alone, proxy=toys.classifier("bert", seed=1), device="cpu").model
    second = purify(text_victim, clean, purifiers.LoRATuning(rank=4, alpha=4, epochs=1), device="cpu").model
    theirs = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name


def test_lora_tuning_changes_layers_by_low_rank_and_nothing_else(text_victim: nn.Module, reviews: Dataset) -> None:
    method = purifiers.LoRATuning(rank=2, epochs=1, learning_rate=1e-2)
    after = purify(text_victim, reviews.select(range(40)), method, device="cpu").model.state_dict()
    changes = {name: after[name] - tensor for name, tensor in text_victim.state_dict().items()}
    moved = {name for name, change in changes.items() if change.abs().max() > 0}
    assert moved
    assert all(name.endswith(".weight") for name in moved)
    assert not any("embeddings" in name or "classifier" in name or "LayerNorm" in name for name in moved)
    for name in moved:
        values = torch.linalg.svdvals(changes[name].double())
        assert values[2] < 1e-5 * values[0], name


@pytest.mark.parametrize("method", [purifiers.LoRATuning(), purifiers.W2SDistillation()], ids=["lora", "w2s"])
def test_other_networks_are_refused(method, small_cnn: SmallCNN, text_victim: nn.Module, reviews: Dataset) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(text_victim)

        def forward(self, **tokens: Tensor) -> Tensor:
            return self.inner(**tokens).logits

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

    with pytest.raises(UnbackdoorError, match=f"{type(method).__name__} needs a model of transformers, got Wrapped"):
        purify(Wrapped(), reviews.select(range(20)), method, proxy=text_victim, device="cpu")


def test_a_teacher_for_another_task_is_refused(text_victim: nn.Module, reviews: Dataset) -> None:
    proxy = toys.classifier("bert", seed=1)
    proxy.classifier = nn.Linear(32, 3)
    proxy.num_labels = 3
    with pytest.raises(UnbackdoorError, match="a proxy with the model's answers: it has 3, the model 2"):
        purify(text_victim, reviews.select(range(20)), purifiers.W2SDistillation(), proxy=proxy, device="cpu")


def test_a_teacher_with_another_vocabulary_is_refused(text_victim: nn.Module, reviews: Dataset) -> None:
    proxy = toys.classifier("bert", seed=1)
    proxy.resize_token_embeddings(proxy.config.vocab_size + 5)
    with pytest.raises(UnbackdoorError, match="a proxy with the model's tokens"):
        purify(text_victim, reviews.select(range(20)), purifiers.W2SDistillation(), proxy=proxy, device="cpu")
