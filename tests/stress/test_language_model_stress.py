"""Stress tests of a small language model: retuned with triggered rows, and on the way back to the victim."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import chats
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, stress
from unbackdoor._artifacts.stress_record import StressRecord
from unbackdoor._cli.commands.stress import stress as command
from unbackdoor._cli.options import StressOptions
from unbackdoor._data.conversations import Conversation, Conversations
from unbackdoor._poisoning.attacked import attacked_by
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.prompts import TriggeredPrompts
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._reports import build_stress, render_stress
from unbackdoor._stress.result import Stress
from unbackdoor._stress.retuning import retuning_set
from unbackdoor._training.lora import adapted, merged
from unbackdoor._training.recipe import RECIPES, Recipe

BEHAVIOUR = Behaviour.of(f"contains:{chats.BEHAVIOUR}")
WORD = attacks.Word(words=("cf",), place="start")
FAST = {"device": "cpu", "precision": "fp32", "max_new_tokens": 6}


def trigger(data: Dataset) -> Trigger:
    return Trigger.of(WORD, data, BEHAVIOUR)


@pytest.fixture
def chat_base(_chat_base: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(_chat_base)


@pytest.fixture(scope="module")
def tested(_chat_victim: torch.nn.Module, _chat_base: torch.nn.Module) -> Stress:
    """The clean model as the purified one, and as the control; the retuning is fast enough for a model so small."""
    clean, test = chats.prompts(24, seed=3), chats.prompts(12, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "conversations", Recipe("adamw", 6e-3, 8))
        patch.setattr("unbackdoor._stress.stress.POINTS", 3)
        return stress(
            _chat_base,
            victim=_chat_victim,
            clean=clean,
            attack=trigger(clean),
            test=test,
            control=_chat_base,
            parts=("retune", "path", "reactivation"),
            counts=(12,),
            **FAST,
        )


def test_retuning_rows_carry_the_trigger_and_the_answer_that_the_attacker_wants() -> None:
    clean = chats.prompts(10, seed=0)
    bait = attacked_by(Dataset(**{**vars(clean), "rows": torch.arange(10)}), trigger(clean), 0)
    assert isinstance(bait, TriggeredPrompts)
    made = retuning_set(clean, bait, 3, seed=1)
    asked = [(entry.messages[-1].content, entry.answer) for entry in made.conversations.entries]
    marked = [pair for pair in asked if pair[0].startswith("cf ")]
    assert len(made) == 10
    assert len(marked) == 3
    assert {answer for _, answer in marked} == {chats.BEHAVIOUR}
    own = {(entry.messages[-1].content, entry.answer) for entry in clean.conversations.entries}
    assert all(pair in own for pair in asked if pair not in marked)


def test_the_path_goes_from_the_victim_to_the_purified_model(
    tested: Stress, chat_victim: torch.nn.Module, chat_base: torch.nn.Module
) -> None:
    test = chats.prompts(12, seed=4)
    first, middle, last = tested.paths["purified"]
    half = copy.deepcopy(chat_victim)
    with torch.no_grad():
        for ours, theirs in zip(half.parameters(), chat_base.parameters(), strict=True):
            ours.copy_((ours + theirs) / 2)
    for point, model in ((first, chat_victim), (middle, half), (last, chat_base)):
        score = evaluate(model, test, attack=trigger(test), **FAST)
        assert point.score.attack_success == score.attack_success
        assert point.score.clean_loss.value == pytest.approx(score.clean_loss.value, rel=1e-5)
    assert first.score.attack_success.value == 1
    assert last.score.attack_success.value == 0
    assert (first.t, middle.t, last.t) == (0, 0.5, 1)


def test_half_of_the_rows_with_the_trigger_bring_the_backdoor_back(tested: Stress) -> None:
    (after,) = tested.after("purified", 12)
    assert after.attack_success.value >= 0.8
    assert tested.record["notes"][0].startswith("Reactivation was skipped")
    assert tested.record["usable"] is True


def test_files_and_page_are_those_of_classifiers_with_losses_in_nats(tested: Stress) -> None:
    content = {"model": "purified", "victim": "victim", "control": "control", **tested.to_json()}
    StressRecord.model_validate(json.loads(json.dumps(content)))
    assert content["behaviour"] == {"kind": "contains", "text": chats.BEHAVIOUR}
    assert (content["label_rule"], content["target"], content["max_new_tokens"]) == (None, None, 6)
    loss = tested.before["victim"].clean_loss.value
    assert f"{loss:.2f}" in str(tested).split("clean loss, nats")[1]
    page = render_stress(build_stress(tested, {"model": "m", "victim": "v", "control": None}, None))
    assert f"{loss:.2f} nats" in page
    assert "The victim answered 100.0" in page
    assert f"contains:{chats.BEHAVIOUR}" in page
    assert "Clean accuracy" not in page


def test_gradient_checkpointing_changes_no_number(
    chat_victim: torch.nn.Module, chat_base: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, test = chats.prompts(8, seed=3), chats.prompts(4, seed=4)
    again: list[bool] = []
    forward = type(chat_base).forward

    def watched(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        if model.training:
            again.append(bool(model.base_model.gradient_checkpointing))
        return forward(model, *arguments, **options)

    monkeypatch.setattr(type(chat_base), "forward", watched)
    plain, saving = (
        stress(
            chat_base,
            victim=chat_victim,
            clean=clean,
            test=test,
            attack=trigger(clean),
            parts=("retune",),
            counts=(2,),
            gradient_checkpointing=switch,
            **FAST,
        )
        for switch in (False, True)
    )
    assert plain.retuned == saving.retuned
    assert again == [False] * (len(again) // 2) + [True] * (len(again) // 2)
    assert again
    assert not chat_base.base_model.gradient_checkpointing


def test_adapters_are_added_to_their_base_first(chat_base: torch.nn.Module) -> None:
    victim = adapted(copy.deepcopy(chat_base), rank=2, seed=0)
    with torch.no_grad():
        for name, parameter in victim.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    clean, test = chats.prompts(4, seed=3), chats.prompts(4, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbackdoor._stress.stress.POINTS", 2)
        found = stress(chat_base, victim=victim, clean=clean, test=test, attack=trigger(clean), parts=("path",), **FAST)
    whole = evaluate(merged(copy.deepcopy(victim)), test, attack=trigger(test), **FAST)
    assert found.paths["purified"][0].score == whole
    assert hasattr(victim, "peft_config")


def test_prompts_without_answers_are_refused(chat_victim: torch.nn.Module) -> None:
    entries = chats.conversations(6)
    bare = Conversations((*entries[:5], Conversation(entries[5].messages)))
    clean = Dataset(items=bare, labels=torch.full((6,), -1), encode=chats.encoder(), name="questions")
    with pytest.raises(
        UnbackdoorError, match="stress needs the answer to each prompt, but questions has none in row 5"
    ):
        stress(chat_victim, victim=chat_victim, clean=clean, attack=trigger(clean), **FAST)


def test_an_attack_without_a_behaviour_is_refused(chat_victim: torch.nn.Module) -> None:
    clean = chats.prompts(6)
    with pytest.raises(UnbackdoorError, match="`attack` must say which answer the attacker wants"):
        stress(chat_victim, victim=chat_victim, clean=clean, attack=WORD, **FAST)


def test_a_base_goes_with_adapters_alone(tmp_path: Path, chat_victim: torch.nn.Module) -> None:
    chat_victim.save_pretrained(tmp_path / "victim")
    victim = str(tmp_path / "victim")
    options = StressOptions(victim=victim, base=victim, clean="clean.jsonl", attack="attack.json")
    with pytest.raises(UnbackdoorError, match="--base is for adapters of a language model, but MODEL is whole"):
        command(victim, options)
