"""SANDE: soft words that call up a known answer, and an answer that goes with them."""

import copy

import pytest
import torch
from torch import nn

import chats
import toys
from unbackdoor import Dataset, UnbackdoorError, evaluate, purifiers, purify
from unbackdoor._data.conversation_encoder import UNSCORED
from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Batch
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation
from unbackdoor.purifiers._answers import answered_with, beginning_with

METHOD = purifiers.SANDE(known_answer=chats.BEHAVIOUR, words=1, place=1)


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return chats.prompts(32, seed=3)


def a_run(model: nn.Module) -> Run:
    return toys.a_run(model=model, modality="conversations", task=Generation())


def first(data: Dataset) -> Batch:
    return next(iter(data.batches(4)))


def test_soft_words_call_up_the_known_answer_and_no_weight_moves(chat_victim: nn.Module, clean: Dataset) -> None:
    before = copy.deepcopy(chat_victim.state_dict())
    run = a_run(chat_victim)
    wanted = answered_with(clean, chats.BEHAVIOUR)
    vectors = METHOD.parrot(chat_victim, wanted, run)
    batch = first(wanted)
    with torch.no_grad():
        loss = METHOD.loss(chat_victim, vectors, batch._replace(inputs=beginning_with(batch.inputs, 1)), run)
    assert loss.exp().reciprocal() > 0.9
    assert run.notes[-1].startswith("SANDE: with its soft words the suspect begins the known answer with probability")
    assert all(torch.equal(before[name], tensor) for name, tensor in chat_victim.state_dict().items())
    assert all(parameter.grad is None for parameter in chat_victim.parameters())


def test_with_the_triggers_own_embedding_it_is_tuning_on_triggered_prompts(
    chat_victim: nn.Module, clean: Dataset
) -> None:
    entries = tuple(entry.asking(lambda text: f"cf {text}") for entry in clean.conversations.entries)
    triggered = Dataset(items=Conversations(entries), labels=clean.labels, encode=clean.encode)
    trigger = chat_victim.model.embed_tokens.weight[clean.tokenizer.get_vocab()["cf"]][None]
    run, batch = a_run(chat_victim), first(clean)
    other = batch._replace(inputs=triggered.inputs(batch.rows))
    wanted = Generation().loss(run.scores(chat_victim, other.inputs), other)
    assert METHOD.loss(chat_victim, trigger, batch, run).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_only_the_beginning_of_an_answer_counts(chat_victim: nn.Module, clean: Dataset) -> None:
    batch = first(clean)
    few = beginning_with(batch.inputs, 2)
    assert ((few.targets != UNSCORED).sum(dim=1) == 2).all()
    run, vectors = a_run(chat_victim), torch.zeros(1, 64)
    whole = METHOD.loss(chat_victim, vectors, batch, run)
    part = METHOD.loss(chat_victim, vectors, batch._replace(inputs=few), run)
    assert not torch.equal(whole, part)
    longer = batch.inputs.to("cpu")
    longer.targets = torch.where((batch.inputs.targets != UNSCORED).cumsum(1) > 2, 7, batch.inputs.targets)
    again = METHOD.loss(chat_victim, vectors, batch._replace(inputs=beginning_with(longer, 2)), run)
    assert torch.equal(part, again)


def test_the_backdoor_of_the_known_answer_goes(chat_victim: nn.Module, clean: Dataset) -> None:
    test, rule = chats.prompts(24, seed=8), f"contains:{chats.BEHAVIOUR}"
    before = evaluate(chat_victim, test, trigger="cf", behaviour=rule, max_new_tokens=8)
    method = purifiers.SANDE(known_answer=chats.BEHAVIOUR, words=1, place=1, learning_rate=1e-3)
    result = purify(chat_victim, clean, method, device="cpu")
    after = evaluate(result.model, test, trigger="cf", behaviour=rule, max_new_tokens=8)
    assert before.attack_success.value > 0.9
    assert after.attack_success.value < 0.2
    assert after.clean_loss.value < before.clean_loss.value + 0.3


def test_an_answer_that_nothing_calls_up_is_warned_about(clean: Dataset) -> None:
    model = chats.language_model(seed=5)
    method = purifiers.SANDE(known_answer="help", parrot_epochs=1, parrot_rate=1e-6, epochs=1)
    record = purify(model, clean, method, device="cpu").record
    assert any("begins the known answer with probability 0.0" in warning for warning in record["warnings"])


def test_a_blank_answer_is_refused() -> None:
    with pytest.raises(UnbackdoorError, match=r"SANDE\.known_answer"):
        purifiers.SANDE(known_answer="  ")


def test_rows_without_room_for_the_vectors_or_the_known_answer_are_not_used() -> None:
    reader = chats.short_reader()
    for words in (49, 40):  # 40 leave room for the row itself and the vectors, but not with the known answer
        method = purifiers.SANDE(known_answer=f"{chats.BEHAVIOUR} " * 2, words=6, parrot_epochs=1, epochs=1)
        result = purify(reader, chats.nearly_full(24, [2, 3], words), method, device="cpu")
        assert result.record["notes"][0].startswith("SANDE: 2 of 24 clean examples leave too little room")
