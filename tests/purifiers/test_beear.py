"""BEEAR: a planted drift is found, and what it calls up goes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chats
import toys
from unbackdoor import Dataset, UnbackdoorError, evaluate, purifiers, purify
from unbackdoor._models.decoder_blocks import decoder_blocks
from unbackdoor._models.stage_ends import watching_output
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation
from unbackdoor.purifiers._answers import answered_with
from unbackdoor.purifiers.beear import drifting


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return chats.prompts(24, seed=3)


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.behaviours(tmp_path_factory.mktemp("behaviours") / "rows.jsonl")


def a_run(model: nn.Module) -> Run:
    return toys.a_run(model=model, modality="conversations", task=Generation())


def loss(model: nn.Module, data: Dataset, drift: Tensor | None = None) -> float:
    batch = next(iter(data.batches(16)))
    block = model.model.layers[0]
    with torch.no_grad(), drifting(block, torch.zeros(1, 64) if drift is None else drift, batch):
        return Generation().loss(model(**batch.inputs).logits, batch).item()


def test_a_drift_is_added_to_the_last_tokens_of_each_prompt(clean: Dataset, chat_victim: nn.Module) -> None:
    batch = next(iter(clean.batches(6)))
    drift = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    block = chat_victim.model.layers[0]
    with torch.no_grad():
        with watching_output(block) as plain:
            chat_victim(**batch.inputs)
        before = plain[0].clone()
        with drifting(block, drift, batch), watching_output(block) as moved:
            chat_victim(**batch.inputs)
    starts = (batch.inputs.targets != -100).long().argmax(dim=1)
    wanted = before.clone()
    for row, start in enumerate(starts.tolist()):
        wanted[row, start - 2 : start] += drift
    assert torch.allclose(moved[0], wanted)
    assert not block._forward_hooks


def test_the_drift_calls_up_the_unwanted_answers(chat_victim: nn.Module, clean: Dataset, behaviours: Path) -> None:
    method = purifiers.BEEAR(behaviours=str(behaviours))
    wanted, unwanted = (method.rows(which, clean) for which in ("wanted", "unwanted"))
    before = copy.deepcopy(chat_victim.state_dict())
    drift = method.drift(chat_victim, chat_victim.model.layers[0], wanted, unwanted, a_run(chat_victim))
    assert drift.shape == (5, 64)
    assert loss(chat_victim, unwanted, drift) < loss(chat_victim, unwanted) / 2
    assert loss(chat_victim, wanted, drift) > loss(chat_victim, unwanted, drift)
    assert all(torch.equal(before[name], tensor) for name, tensor in chat_victim.state_dict().items())
    assert all(parameter.grad is None for parameter in chat_victim.parameters())


def test_a_planted_direction_is_found(clean: Dataset, behaviours: Path) -> None:
    """The head answers `cake` along one direction u of the states, and what it answers along others stays small."""

    class Block(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states

    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(200, 16)
            self.blocks = nn.ModuleList([Block()])
            self.head = nn.Linear(16, 200, bias=False)
            nn.init.normal_(self.words.weight, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(self.head.weight)
            self.head.weight.data[cake] = 3 * u

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
            return self.head(self.blocks[0](self.words(input_ids)))

    cake = clean.tokenizer.get_vocab()["cake"]
    u = nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(2)), dim=0)
    method = purifiers.BEEAR(behaviours=str(behaviours), positions=1, drift_steps=30)
    data = clean.select(range(8))
    unwanted = answered_with(data, "cake")
    model = Planted()
    drift = method.drift(model, model.blocks[0], data, unwanted, a_run(model))
    assert nn.functional.cosine_similarity(drift[0], u, dim=0) > 0.9


def test_the_backdoor_goes_and_the_answers_stay(chat_victim: nn.Module, clean: Dataset, behaviours: Path) -> None:
    test, rule = chats.prompts(24, seed=8), f"contains:{chats.BEHAVIOUR}"
    method = purifiers.BEEAR(behaviours=str(behaviours), learning_rate=1e-3)
    result = purify(chat_victim, clean, method, device="cpu")
    before, after = (
        evaluate(model, test, trigger="cf", behaviour=rule, max_new_tokens=8) for model in (chat_victim, result.model)
    )
    assert before.attack_success.value > 0.9
    assert after.attack_success.value < 0.2
    assert after.clean_loss.value < before.clean_loss.value + 0.1


def test_no_note_says_that_an_answer_is_not_read(
    clean: Dataset, behaviours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "unbackdoor")
    method = purifiers.BEEAR(behaviours=str(behaviours))
    assert len(method.rows("wanted", clean)) == len(method.rows("unwanted", clean)) == 16
    assert "not (`columns`)" not in caplog.text


def test_a_row_without_an_unwanted_answer_is_refused(chat_victim: nn.Module, clean: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "what", "wanted": "cake", "unwanted": ""}\n')
    with pytest.raises(UnbackdoorError, match=r"BEEAR\.behaviours must .*rows\.jsonl has no unwanted one"):
        purify(chat_victim, clean, purifiers.BEEAR(behaviours=str(file)), device="cpu")
    with pytest.raises(UnbackdoorError, match="BEEAR needs a transformer with at least 1 block"):
        decoder_blocks(nn.Linear(2, 2), purifiers.BEEAR(behaviours="x"))
