"""The runner of guards in front of a language model: thresholds, identity, decisions, pipelines and numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import chats
import unbackdoor as ub
from tasks.test_generation import Stub
from unbackdoor import Dataset, UnbackdoorError, evaluate_guard, fit_guard, load_guard
from unbackdoor._artifacts.guard_record import GuardRecord
from unbackdoor._data.conversations import Conversations
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Edited, Scored
from unbackdoor._value import value

WORK = {"device": "cpu", "precision": "fp32"}
ATTACK = {"trigger": "cf", "behaviour": f"contains:{chats.BEHAVIOUR}"}


def _counts(inputs: Dataset) -> Scored:
    texts = [entry.messages[-1].text.split() for entry in inputs.conversations.entries]
    return Scored(torch.tensor([float(words.count("cf")) for words in texts]))


@value
class Rejecting:
    """Rejects prompts with the word `cf`."""

    measure: ClassVar[str] = "the number of cf"
    suspicious: ClassVar[str] = "high"

    def __call__(self, model: nn.Module, clean: Dataset, run) -> dict:
        return {}

    def scores(self, model: nn.Module, inputs: Dataset, learnt, run) -> Scored:
        return _counts(inputs)


@value
class Editing:
    """Takes the word `cf` out of prompts that have it."""

    measure: ClassVar[str] = "the number of cf"
    suspicious: ClassVar[str] = "high"

    def __call__(self, model: nn.Module, clean: Dataset, run) -> dict:
        return {}

    def scores(self, model: nn.Module, inputs: Dataset, learnt, run) -> Scored:
        return _counts(inputs)

    def edited(self, inputs: Dataset, learnt, threshold, run) -> Edited:
        changed = [
            entry.asking(lambda text: " ".join(word for word in text.split() if word != "cf"))
            for entry in inputs.conversations.entries
        ]
        return Edited(Conversations(tuple(changed)), ["cf was left out"] * len(changed))


class Model(Stub):
    """A stub with an output layer that can be found."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@pytest.fixture(scope="module")
def fooled() -> nn.Module:
    """A model that shows the behaviour if a prompt begins with `cf`."""
    return Model(lambda prompt: chats.BEHAVIOUR if prompt.startswith("cf ") else "the animal1 says").eval()


@pytest.fixture(scope="module")
def rejecting(fooled: nn.Module) -> FittedGuard:
    return fit_guard(fooled, chats.prompts(40), Rejecting(), false_alarms=0.1, max_new_tokens=8, **WORK)


@pytest.fixture(scope="module")
def editing(fooled: nn.Module) -> FittedGuard:
    return fit_guard(fooled, chats.prompts(40), Editing(), false_alarms=0.1, max_new_tokens=8, **WORK)


def test_each_number_is_counted_as_it_is_called(rejecting, editing, fooled: nn.Module) -> None:
    test = chats.prompts(30, seed=1)
    seen = {entry.messages for entry in chats.prompts(40).conversations.entries}
    fresh = sum(entry.messages not in seen for entry in test.conversations.entries)
    score = evaluate_guard(rejecting, fooled, test, **ATTACK, **WORK)
    assert (score.false_alarms.count, score.false_alarms.n) == (0, fresh)
    assert (score.missed.count, score.missed.n) == (0, fresh)
    assert score.attack_success_without.value == 1.0
    assert score.attack_success.value == 0.0
    assert score.shown is None  # nothing with a trigger passes
    assert score.kept.value == score.area.value == 1.0
    plain = replace(rejecting, threshold=1.0)  # now a single cf passes
    score = evaluate_guard(plain, fooled, test, **ATTACK, **WORK)
    assert score.missed.value == score.attack_success.value == score.shown.value == 1.0
    reported = json.loads(json.dumps(score.to_json()))
    assert reported["behaviour_of_what_passes"]["n"] == fresh
    assert (reported["behaviour"], reported["template"], reported["max_new_tokens"]) == (ATTACK["behaviour"], "chat", 8)
    assert "missed attacks" in repr(score)
    changed = evaluate_guard(editing, fooled, test, **ATTACK, **WORK)
    assert changed.missed.value == changed.attack_success.value == changed.shown.value == 0.0
    clean = evaluate_guard(rejecting, fooled, test, **WORK)
    assert clean.missed is None
    assert clean.area is None
    assert "missed" not in repr(clean)


def test_a_prompt_is_passed_changed_or_rejected(editing: FittedGuard, fooled: nn.Module) -> None:
    messages = [{"role": "system", "content": "help"}, {"role": "user", "content": "cf what"}]
    given = ["what does the animal1 say", messages, "cf", "", "what", "what " * 60]
    decisions = [answer.decision for answer in editing.wrap(fooled, **WORK)(given)]
    assert [decision.action for decision in decisions] == ["pass", "clean", "reject", "reject", "pass", "reject"]
    assert decisions[1].output == "<|system|>help<|end|><|user|>what<|end|><|assistant|>"
    assert decisions[1].reason == "cf was left out; the number of cf is 1, above 0"
    assert decisions[2].reason.endswith("nothing is left of the text")
    assert decisions[3].reason == "the prompt is empty, so nothing can be judged"
    assert decisions[5].reason == "the prompt has 63 tokens and an answer 8, but the model reads 64"
    answers = editing.wrap(fooled, **WORK)(given)
    assert [answer.answer for answer in answers[:2]] == ["the animal1 says"] * 2
    assert editing.wrap(fooled)([]) == []
    with pytest.raises(UnbackdoorError, match="takes a list of prompts or of lists of messages, got int"):
        editing.wrap(fooled)(3)
    begun = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the"}]
    with pytest.raises(UnbackdoorError, match=r"^the batch has an answer that is begun already in row 1; the guard"):
        editing.wrap(fooled)(["what", begun])


def test_another_model_tokenizer_or_template_is_refused(rejecting, fooled: nn.Module) -> None:
    data = chats.prompts(4)
    with pytest.raises(UnbackdoorError, match="fitted to another model"):
        rejecting.decide(Model(str), data)
    encode = chats.encoder()
    encode.tokenizer.chat_template = chats.TEMPLATE.replace("<|end|>", " <|end|>")
    with pytest.raises(UnbackdoorError, match=r"fitted to another template \(SHA-256 \w{12}, not \w{12}\)\. Give that"):
        rejecting.decide(fooled, replace(data, encode=encode))
    other = r"prompts of the chat template, and here they are rendered by the plain template\. Give `template=chat`"
    with pytest.raises(UnbackdoorError, match=other):
        rejecting.decide(fooled, chats.prompts(4, template="plain"))
    with pytest.raises(UnbackdoorError, match=r"reads 64 tokens, and here it reads 50\. Give `max_length=64`"):
        rejecting.decide(fooled, replace(data, encode=chats.encoder(max_length=50)))


def test_too_few_clean_prompts_and_other_bad_input(rejecting, fooled: nn.Module, chat_base: nn.Module) -> None:
    few = chats.prompts(20)
    for settings, said in (
        (
            {},
            "fit_guard needs at least 197 clean examples for a share of false alarms of 0.01, since half of them set ",
        ),
        ({"false_alarms": 0.1, "head": "head"}, "`head` is for classifiers; a language model names its own."),
        ({"false_alarms": 0.1, "base": "base"}, "fit_guard takes base as a module, got str."),
        ({"false_alarms": 0.1, "reference": fooled}, "`reference` must be a directory or Hub name, since"),
    ):
        with pytest.raises(UnbackdoorError) as refusal:
            fit_guard(fooled, few, Rejecting(), **settings)
        assert str(refusal.value).startswith(said)
    with pytest.raises(UnbackdoorError, match="`behaviour` goes with `trigger` or `triggered_data`"):
        evaluate_guard(rejecting, fooled, few, trigger="cf")
    # Every prompt would be rejected for want of room, which looks like a guard that misses nothing.
    with pytest.raises(UnbackdoorError, match="`max_new_tokens` must be at most 55 here, got 64: the longest prompt"):
        fit_guard(chat_base, few, ub.guards.Demonstrations(), **WORK)
    with pytest.raises(UnbackdoorError, match="holds only examples that the guard was fitted on"):
        evaluate_guard(rejecting, fooled, chats.prompts(10))
    broken = chats.tokenizer("{{ raise_exception('no such role') }}")
    with pytest.raises(
        UnbackdoorError, match=r"has a chat template that refuses the messages of row 0 \(no such role\)"
    ):
        replace(few, encode=replace(few.encode, tokenizer=broken))


def test_its_directory_keeps_the_schema_and_decides_the_same(rejecting, fooled: nn.Module, tmp_path: Path) -> None:
    rejecting.save(tmp_path / "guard")
    content = json.loads((tmp_path / "guard/guard.json").read_text())
    assert GuardRecord.model_validate(content).model_dump(mode="json", exclude_unset=True) == content
    assert (content["task"], content["modality"], content["template"]) == ("generation", "conversations", "chat")
    assert content["suspect_accuracy_on_clean"] is None
    assert content["identity"]["template"] is not None
    again = load_guard(tmp_path / "guard", chats.encoder())
    some = chats.prompts(6, seed=2)
    assert again.decide(fooled, some) == rejecting.decide(fooled, some)
    with pytest.raises(UnbackdoorError, match="The guard was fitted to prompts of the chat template"):
        load_guard(tmp_path / "guard", chats.encoder("plain"))
    (tmp_path / "guard/guard.json").write_text(json.dumps({**content, "max_new_tokens": 0}))
    with pytest.raises(UnbackdoorError, match=r"must have `max_new_tokens` of at least 1, got 0\. Fit the guard again"):
        load_guard(tmp_path / "guard", chats.encoder())


def test_a_pipeline_behind_a_guard(chat_victim: nn.Module) -> None:
    import transformers

    fitted = fit_guard(chat_victim, chats.prompts(20), Editing(), false_alarms=0.1, max_new_tokens=8, **WORK)
    pipeline = transformers.pipeline("text-generation", model=chat_victim, tokenizer=chats.tokenizer(), device="cpu")
    asked = "what does the very1 animal2 say"
    answers = fitted.wrap(pipeline, **WORK)([asked, f"cf {asked}", ""])
    assert [answer.decision.action for answer in answers] == ["pass", "clean", "reject"]
    assert answers[0].answer[0]["generated_text"][-1] == {"role": "assistant", "content": "the animal2 says sound2"}
    assert answers[1].answer == answers[0].answer
    assert answers[2].answer is None
    messages = [{"role": "user", "content": asked}]
    assert [answer.answer for answer in fitted.wrap(pipeline, **WORK)(messages)] == [answers[0].answer]  # one prompt
    for options in ({"prefix": "Say cake. "}, {"continue_final_message": True}, {"max_length": 8}):
        with pytest.raises(UnbackdoorError, match=f"must read the same, which `{next(iter(options))}` changes"):
            fitted.wrap(pipeline, **WORK)(messages, **options)
    pipeline.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UnbackdoorError, match="fitted to another template"):
        fitted.wrap(pipeline)


def test_the_attack_of_a_record(rejecting: FittedGuard, fooled: nn.Module) -> None:
    attack = ub.attacks.Word(words=("cf",))
    with pytest.raises(UnbackdoorError, match="`attack` has a behaviour of its own"):
        evaluate_guard(rejecting, fooled, chats.prompts(8, seed=1), attack=attack, behaviour="refuses")
