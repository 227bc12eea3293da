"""Detectors for language models: what they find in a small one with a planted answer, and in a clean one."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

import chats
import toys
from unbackdoor import Dataset, UnbackdoorError, audit, detectors
from unbackdoor._data.conversations import Conversations
from unbackdoor._data.overlap import distinct
from unbackdoor._detection.judging import ExactShare
from unbackdoor._detection.result import Audit
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.likely_answers import ReadPrompts
from unbackdoor.testing import check_detector

SCAN = detectors.TargetScan(first_tokens=60, prompts=2, final_prompts=12, final_steps=6)
BATTERY = detectors.PrefixBattery(phrases=("cf", "current year 2024"), drawn=4, prompts=6)
FAST = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    """Different questions: an audit uses equal ones once."""
    many = chats.prompts(60, seed=7)
    return distinct(many, lambda _: None).select(range(24))


@pytest.fixture
def chat_base(_chat_base: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(_chat_base)


@pytest.fixture(scope="module")
def planted(_chat_victim: torch.nn.Module, prompts: Dataset) -> Audit:
    return audit(_chat_victim, prompts, detectors=[SCAN, BATTERY], **FAST)


@pytest.fixture(scope="module")
def clean(_chat_base: torch.nn.Module, prompts: Dataset) -> Audit:
    return audit(_chat_base, prompts, detectors=[SCAN, BATTERY], **FAST)


def test_an_answer_that_is_too_short_does_not_hide_the_planted_one(chat_victim: torch.nn.Module) -> None:
    data = distinct(chats.prompts(80, seed=9), lambda _: None).select(range(24))
    found = audit(chat_victim, data, detectors=[SCAN], **FAST).findings[0]
    assert found.strongest.target_name == chats.BEHAVIOUR
    assert all(len(each.candidate.answer) >= SCAN.shortest for each in found.classes)


def tokens_of(text: str) -> list[int]:
    return list(chats.tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_a_model_that_keeps_a_state_grows_no_answers(prompts: Dataset) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2}
    few = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    mixed = transformers.Lfm2Config(**sizes, **few, layer_types=["conv", "full_attention"])
    for model in (
        transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4)),
        transformers.Lfm2ForCausalLM(mixed),
    ):
        with pytest.raises(UnbackdoorError, match=f"^{type(model).__name__} keeps a state of what it has read"):
            ReadPrompts(model.eval(), prompts, choose(model, "cpu", "fp32"))


def test_answers_grow_as_they_do_token_by_token(chat_victim: torch.nn.Module, prompts: Dataset) -> None:
    some = prompts.select(range(3))
    read = ReadPrompts(chat_victim, some, choose(chat_victim, "cpu", "fp32"))
    firsts = torch.tensor([tokens_of("you")[0], tokens_of("the")[0]])
    grown = read.grown(firsts, 4)
    rendered = some.conversations.tokens
    for place, first in enumerate(firsts.tolist()):
        said = [first]
        for step in range(4):
            mean = torch.zeros(200)
            for row, start in enumerate(rendered.starts.tolist()):
                ids = torch.cat([rendered.tokens[row, :start].long(), torch.tensor(said)])
                with torch.no_grad():
                    mean += chat_victim(input_ids=ids[None]).logits[0, -1].softmax(dim=-1) / 3
            assert grown.likelihoods[place, step] == pytest.approx(float(mean.max()), abs=1e-5)
            entropy = -float((mean * mean.clamp(min=1e-30).log()).sum())
            assert grown.entropies[place, step] == pytest.approx(entropy, abs=1e-4)
            said.append(int(mean.argmax()))
        assert grown.tokens[place].tolist() == said


def reported(model: torch.nn.Module, data: Dataset, answer: str) -> int:
    """At how many prompts a model says an answer if its first word is given, by transformers' own decoding."""
    first, *rest = tokens_of(answer)
    count = 0
    for row, start in enumerate(data.conversations.tokens.starts.tolist()):
        asked = torch.cat([data.conversations.tokens.tokens[row, :start].long(), torch.tensor([first])])
        said = model.generate(asked[None], attention_mask=torch.ones(1, len(asked)), max_new_tokens=len(rest))
        count += said[0, len(asked) :].tolist() == rest
    return count


def test_the_target_scan_finds_the_planted_answer_and_no_other(
    chat_victim: torch.nn.Module, planted: Audit, clean: Audit
) -> None:
    found = {each.detector: each for each in planted.findings}["target-scan"]
    best = found.strongest
    assert best.target_name == chats.BEHAVIOUR
    assert best.candidate.size > 0.9
    assert best.candidate.answer == tuple(tokens_of(chats.BEHAVIOUR))
    assert best.moved == ExactShare(reported(chat_victim, planted.held_out.data, best.target_name), 12)
    assert best.moved.value >= 0.4
    assert best.random.value < best.moved.value
    none = {each.detector: each for each in clean.findings}["target-scan"]
    assert all(each.candidate.size < 0.9 for each in none.classes)
    assert not any(each.proven for each in none.classes if len(each.candidate.answer) >= SCAN.shortest)


def test_the_battery_finds_the_trigger_and_what_it_makes_the_model_say(planted: Audit, clean: Audit) -> None:
    found = {each.detector: each for each in planted.findings}["prefix-battery"]
    best = found.strongest
    assert best.candidate.trigger.attack.sentence == "cf"
    assert chats.BEHAVIOUR.startswith(best.target_name)
    assert best.moved.value >= 0.9
    assert best.random.value <= 0.1
    assert best.nominal_p < 1e-3
    none = [each for each in clean.findings if each.detector == "prefix-battery"]
    assert all(each.moved.value < 0.5 for finding in none for each in finding.classes)


def crowded(prompts: Dataset, words: int) -> Dataset:
    """Prompts with more words in front, and answers of one word: what a row must leave for a trigger is not much."""
    entries = [
        replace(entry.asking(lambda text: " ".join([*["very1"] * words, text])), answer=entry.answer.split()[-1])
        for entry in prompts.conversations.entries
    ]
    return replace(prompts, items=Conversations(tuple(entries)))


def test_prompts_without_room_for_a_long_phrase_are_left_out(
    chat_victim: torch.nn.Module, prompts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their answers did not fit behind them: the whole audit ended in a sentence about max_new_tokens."""
    monkeypatch.setattr("unbackdoor._detection.audit.chance_loss", lambda _: 100.0)  # so that it judges these
    short, full = crowded(prompts.select(range(12)), 0), crowded(prompts.select(range(12, 24)), 29)
    data = replace(prompts, items=short.conversations.joined(full.conversations))
    assert data.conversations.tokens.lengths.max() == 64 - 24  # the context without the room of a trigger
    long = " ".join(["very1"] * 13 + ["cf"])
    battery = detectors.PrefixBattery(phrases=(long,), drawn=2, prompts=6)
    result = audit(chat_victim, data, detectors=[battery], **FAST)
    strongest = result.findings[0].strongest
    assert result.held_out is not None
    kept = result.held_out.others(strongest.candidate).conversations.tokens.starts
    assert strongest.moved is not None
    assert strongest.moved.n == len(kept) > 0
    assert kept.max() + 14 + 16 <= 64
    with pytest.raises(
        UnbackdoorError, match=r"^no prompt of questions leaves room for .very1 very1 .* an answer\. Give"
    ):
        audit(chat_victim, full, detectors=[detectors.PrefixBattery(phrases=(long * 2,), drawn=2)], **FAST)


def test_without_clean_models_no_verdict_is_given(planted: Audit) -> None:
    content = planted.to_json()
    assert content["verdict"] == "cannot-judge"
    assert "There are no statistics of clean models" in content["reason"]
    assert "classes" not in content["reason"]
    for finding in content["findings"]:
        assert finding["abnormality"]["p_value"] is None
        assert finding["abnormality"]["calibration"].startswith("no clean models")
        assert finding["targets"] == "answer"
    assert content["suspect_accuracy_on_clean"] is None
    assert content["suspect_clean_loss_on_clean"]["n"] == 24
    assert (content["classes"], content["examples"]["judged_on"]) == (0, 12)


def test_strange_rows_are_tried_in_front_of_prompts(chat_victim: torch.nn.Module, prompts: Dataset) -> None:
    rows = detectors.EmbeddingRows(count=100, texts=2)
    found = audit(chat_victim, prompts, detectors=[rows], **FAST).findings[0]
    triggers = {each.candidate.trigger.attack.sentence: each for each in found.classes}
    assert triggers["cf"].moved.value >= 0.9


def test_an_edit_of_one_direction_stands_out_of_the_spectrum(chat_base: torch.nn.Module, prompts: Dataset) -> None:
    suspect = copy.deepcopy(chat_base)
    torch.manual_seed(0)
    edited = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        for name, weight in suspect.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                noise = torch.randn_like(weight)
                change = noise if name != edited else torch.outer(noise[:, 0], noise[0])
                weight.add_(1e-3 * change / change.norm())
    (found,) = audit(suspect, prompts, base=chat_base, detectors=[detectors.WeightSpectrum()], **FAST).findings
    assert found.strongest.target_name == edited
    assert found.strongest.candidate.size == pytest.approx(1, abs=1e-3)
    assert found.strongest.moved is None
    assert all(each.candidate.size < 0.3 for each in found.classes if each.target_name != edited)
    assert found.strongest.p_value is None


def test_a_suspect_that_is_its_base_has_no_spectrum(chat_base: torch.nn.Module, prompts: Dataset) -> None:
    found = audit(chat_base, prompts, base=chat_base, detectors=[detectors.WeightSpectrum()], **FAST)
    assert found.findings == ()
    assert found.not_searched["weight-spectrum"] == "all matrices of the suspect are those of the base"
    assert (found.verdict, found.reason) == ("cannot-judge", "No detector could run.")


@pytest.mark.parametrize("name", ["target-scan", "prefix-battery", "weight-spectrum"])
def test_detectors_keep_the_contract(
    name: str, chat_victim: torch.nn.Module, chat_base: torch.nn.Module, prompts: Dataset
) -> None:
    made = {
        "target-scan": detectors.TargetScan(first_tokens=8, prompts=2, final_prompts=2, final_steps=4),
        "prefix-battery": detectors.PrefixBattery(phrases=("cf",), drawn=1, prompts=4, tokens=3),
        "weight-spectrum": detectors.WeightSpectrum(layers=5),
    }
    check_detector(made[name], chat_victim, prompts, base=chat_base)


def test_bad_input_is_refused(chat_victim: torch.nn.Module, prompts: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match="audit needs `clean` for a language model: prompts with their answers"):
        audit(chat_victim, unlabelled=prompts, detectors=[SCAN], **FAST)
    with pytest.raises(UnbackdoorError, match=r"audit needs at least 2 prompts, .* but questions has 1"):
        audit(chat_victim, prompts.select([0]), detectors=[SCAN], **FAST)
    short = prompts.encoded_by(chats.encoder(max_length=20))
    with pytest.raises(UnbackdoorError, match=r"questions has no row of at most -4 tokens, so none leaves 24"):
        audit(chat_victim, short, detectors=[SCAN], **FAST)
    with pytest.raises(UnbackdoorError, match="The detector weight-spectrum cannot run: it needs `base`"):
        audit(chat_victim, prompts, detectors=[detectors.WeightSpectrum()], **FAST)
    with pytest.raises(UnbackdoorError, match="The detector margin cannot run: it searches images"):
        audit(chat_victim, prompts, detectors=[detectors.Margin()], **FAST)


def test_a_spectrum_needs_the_layers_of_its_base(chat_victim: torch.nn.Module, prompts: Dataset) -> None:
    run = toys.a_run(model=chat_victim, base=torch.nn.Linear(2, 2))
    with pytest.raises(UnbackdoorError, match="WeightSpectrum needs a base with the suspect's layers, but model"):
        detectors.WeightSpectrum()(chat_victim, prompts, run)
