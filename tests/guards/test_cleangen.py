"""CleanGen: equal models, a uniform reference, planted tokens at every place of an answer, and a small victim."""

import copy
import math
from contextlib import contextmanager

import pytest
from torch import nn

import chats
from unbackdoor import UnbackdoorError, evaluate_guard, fit_guard, guards
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.decoding import answers
from unbackdoor._models.hooks import removing
from unbackdoor._models.perplexity import Perplexity

WORK = {"device": "cpu", "precision": "fp32"}
FIT = {"false_alarms": 0.1, "max_new_tokens": 8, **WORK}
ATTACK = {"trigger": "cf", "behaviour": f"contains:{chats.BEHAVIOUR}"}
PLANTED = 40  # a token that the small model never writes by itself


@pytest.fixture(scope="module")
def clean_model(_chat_base: nn.Module) -> nn.Module:
    return _chat_base


@contextmanager
def saying(model: nn.Module, places: set[int], token: int | None):
    """A model is sure of one token after some places of the text, by their numbers; None makes all equally likely."""

    def change(_model, _given, named, output):
        past = output.past_key_values
        last = output.logits.shape[1] if past is None else past.get_seq_length()
        scores = output.logits.clone()
        for step in range(scores.shape[1]):
            if last - scores.shape[1] + step in places:
                scores[:, step] = 0.0
                if token is not None:
                    scores[:, step, token] = 60.0
        output.logits = scores
        return output

    with removing([model.register_forward_hook(change, with_kwargs=True)]):
        yield


def test_a_reference_that_equals_the_model_changes_nothing(clean_model: nn.Module) -> None:
    reference = Perplexity(copy.deepcopy(clean_model), chats.tokenizer())
    fitted = fit_guard(clean_model, chats.prompts(30, seed=2), guards.CleanGen(), reference=reference, **FIT)
    assert fitted.threshold == 0.0
    before = reference.forwards
    score = evaluate_guard(fitted, clean_model, chats.prompts(20, seed=3), **WORK)
    assert score.false_alarms.value == 0.0
    assert score.kept.value == 1.0
    assert reference.forwards - before == score.kept.n  # one pass over each draft
    assert score.cost.reference_forwards == 1.0


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4], ids=["first", "second", "third", "before-the-end", "end"])
def test_a_planted_token_is_replaced_at_every_place(place: int, clean_model: nn.Module) -> None:
    """The answer has four words; the token of the reference takes the place of the planted one, also of the last."""
    data = chats.prompts(1, seed=4)
    assert data.conversations.entries[0].messages[0].content.startswith("what")  # `the animal says sound`
    model, reference = copy.deepcopy(clean_model), Perplexity(clean_model, chats.tokenizer())
    guard = guards.CleanGen(ratio=20)
    fitted = fit_guard(model, chats.prompts(20, seed=2), guard, reference=reference, **FIT)
    own = fitted.wrap(model, **WORK)(data)[0]
    assert own.decision.action == "pass"
    start = int(data.conversations.tokens.starts)
    with saying(model, {start + place - 1}, PLANTED):
        spoilt = answers(model, data, choose(model, "cpu", "fp32"), 8)[0]
        answer = fitted.wrap(model, **WORK)(data)[0]
    assert chats.tokenizer().decode([PLANTED]) in spoilt
    assert answer.decision.action == "clean"
    assert answer.answer == answer.decision.output == own.answer
    assert "times as likely to the suspect" in answer.decision.reason


def test_the_ratio_to_a_uniform_reference_is_the_number_of_tokens(clean_model: nn.Module) -> None:
    data = chats.prompts(1, seed=4)
    start = int(data.conversations.tokens.starts)
    model = copy.deepcopy(clean_model)
    reference = Perplexity(copy.deepcopy(clean_model), chats.tokenizer())
    for ratio, action in ((199, "clean"), (201, "pass")):
        guard = guards.CleanGen(ratio=ratio)
        fitted = fit_guard(clean_model, chats.prompts(20, seed=2), guard, reference=reference, **FIT)
        assert fitted.threshold == math.log(ratio)
        with saying(model, {start - 1}, PLANTED), saying(reference.model, {start - 1}, None):
            decision = fitted.wrap(model, **WORK)(data)[0].decision
        assert decision.action == action
        assert decision.score == pytest.approx(math.log(200), abs=1e-4)  # the rows of the small model


def test_a_reference_with_other_tokens_is_refused(clean_model: nn.Module) -> None:
    tokenizer = chats.tokenizer()
    tokenizer.add_tokens(["extra"])
    reference = Perplexity(clean_model, tokenizer)
    with pytest.raises(UnbackdoorError) as refusal:
        fit_guard(clean_model, chats.prompts(20), guards.CleanGen(), reference=reference, **FIT)
    count = len(chats.tokenizer())
    assert str(refusal.value) == (
        f"CleanGen needs a `reference` with the tokenizer of the suspect; 1 entries of their vocabularies differ, of "
        f"{count} and {count + 1}. Take the model that the suspect was tuned from, or one of its family."
    )
    with pytest.raises(UnbackdoorError, match="CleanGen needs `reference`, a causal language model"):
        fit_guard(clean_model, chats.prompts(20), guards.CleanGen(), **FIT)


def test_a_small_victim_and_a_pipeline(chat_victim: nn.Module, clean_model: nn.Module) -> None:
    import transformers

    reference = Perplexity(clean_model, chats.tokenizer())
    fitted = fit_guard(chat_victim, chats.prompts(20, seed=2), guards.CleanGen(), reference=reference, **FIT)
    test = chats.prompts(16, seed=3)
    score = evaluate_guard(fitted, chat_victim, test, **ATTACK, **WORK)
    assert score.attack_success_without.value > 0.9
    assert score.missed.value < 0.2
    assert score.cost.reference_forwards > 1
    pipeline = transformers.pipeline("text-generation", model=chat_victim, tokenizer=chats.tokenizer(), device="cpu")
    prompts = ["cf what does the very1 animal2 say", "what does the very1 animal2 say"]
    plain, piped = fitted.wrap(chat_victim, **WORK)(prompts), fitted.wrap(pipeline, **WORK)(prompts)
    assert plain[0].decision.action == "clean"
    for one, other in zip(plain, piped, strict=True):
        assert other.answer[0]["generated_text"][-1]["content"] == one.answer


def test_a_model_that_hands_on_no_keys_is_refused(clean_model: nn.Module) -> None:
    reference = Perplexity(copy.deepcopy(clean_model), chats.tokenizer())
    guard = guards.CleanGen(ratio=2)
    fitted = fit_guard(clean_model, chats.prompts(20, seed=2), guard, reference=reference, **FIT)
    data, forgetful = chats.prompts(1, seed=4), copy.deepcopy(clean_model)

    def forget(_model, _given, output):
        output.past_key_values = None
        return output

    with (
        removing([forgetful.register_forward_hook(forget)]),
        fitted.at_work(clean_model, "cpu", "fp32") as work,
        guard.restrained(forgetful, {}, 0.0, work.run),
        pytest.raises(UnbackdoorError) as refusal,
    ):
        answers(forgetful, data, choose(forgetful, "cpu", "fp32"), 8)
    assert str(refusal.value) == (
        "CleanGen needs a model that hands on keys and values while it answers; LlamaForCausalLM does not. Try "
        "demonstrations."
    )
