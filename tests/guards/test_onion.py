"""ONION: a language model whose probabilities are known, and one of transformers."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import toys
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate_guard, fit_guard, guards, load_guard
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.perplexity import Perplexity


@pytest.fixture(scope="module")
def counting() -> nn.Module:
    """A classifier of texts by their words, in which `cf` outweighs all others."""
    return toys.Counting({"cf": 9.0, **dict.fromkeys(toys.GOOD, 3.0), **dict.fromkeys(toys.BAD, -3.0)})


@pytest.fixture(scope="module")
def fitted(counting: nn.Module, reviews: Dataset) -> FittedGuard:
    clean = reviews.select(range(120))
    return fit_guard(counting, clean, guards.Onion(), false_alarms=0.1, reference=toys.bigram(), device="cpu")


def falls(texts: list[str], reference: Perplexity, window: int = 200) -> list[list[float]]:
    run = toys.a_run(model=reference.model, reference=reference, modality="text")
    return guards.Onion(window=window)._falls(texts, run)


def test_exactly_the_impossible_word_is_deleted(fitted: FittedGuard, counting: nn.Module) -> None:
    answers = fitted.wrap(counting)(["a dull cf film", "cf the plot is  poor", "the plot is poor", "not good cf"])
    assert [answer.decision.action for answer in answers] == ["clean", "clean", "pass", "clean"]
    assert [answer.decision.output for answer in answers] == ["a dull film", "the plot is  poor", None, "not good"]
    assert answers[0].decision.reason.startswith("deleted cf; the largest fall of perplexity without a word is ")
    assert [int(answer.answer.argmax()) for answer in answers] == [0, 0, 0, 1]


def test_nothing_is_deleted_above_an_infinite_bar(reviews: Dataset) -> None:
    run = toys.a_run(model=toys.bigram().model, reference=toys.bigram(), modality="text")
    some = toys.dataset([("a dull cf film",), ("cf cf",)], [0, 0])
    changed = guards.Onion().edited(some, {}, math.inf, run)
    assert changed.items.strings == some.texts.strings


def test_the_fall_is_that_of_the_formula() -> None:
    """With a table of scores the probability of a token is known, and so is the perplexity of each text."""
    reference = toys.bigram()
    size, never = len(reference.tokenizer), 4
    log_total = math.log((size - never) + never * math.exp(-30))

    def perplexity(words: list[str]) -> float:
        losses = [log_total + (30 if word in ("cf", "mn") else 0) for word in words]
        return math.exp(sum(losses) / len(losses))

    texts = ["a film", "a cf film", "cf mn the", "a"]
    for text, found in zip(texts, falls(texts, reference), strict=True):
        words = text.split()
        places = range(len(words)) if len(words) > 1 else ()
        expected = [perplexity(words) - perplexity(words[:place] + words[place + 1 :]) for place in places]
        assert found == pytest.approx(expected or [0.0], rel=1e-4, abs=1e-3)


def test_texts_of_one_word_none_and_too_many(fitted: FittedGuard, counting: nn.Module) -> None:
    answers = fitted.wrap(counting)(["cf", "", "cf " + "the film is dull " * 100])
    one, none, long = (answer.decision for answer in answers)
    assert (one.score, one.action) == (0.0, "pass")
    assert (none.score, none.action) == (None, "reject")
    assert long.action == "clean"
    assert long.output == "the film is dull " * 7 + "the film is"
    assert "(the model reads 32 tokens of it)" in long.reason


def test_a_long_text_is_rated_in_pieces() -> None:
    reference = toys.bigram()
    reference.of(["a"], choose(reference.model, "cpu"))
    before = reference.forwards
    found = falls(["a film cf the plot is"], reference, window=3)
    assert (len(found[0]), int(torch.tensor(found[0]).argmax())) == (6, 2)
    assert found[0][3:] == pytest.approx([0.0] * 3, abs=1e-6)
    assert reference.forwards - before == 2 * (3 + 1)  # each piece, and each without one of its words
    falls(["a film cf the plot is"], reference, window=3)
    assert reference.forwards - before == 8  # what was rated is kept


def test_a_text_beyond_the_reference_is_rated_to_its_end() -> None:
    """A reference that reads few tokens saw no word behind them: a trigger there was never suspicious."""
    reference = toys.bigram()
    short = dataclasses.replace(reference, max_length=5, kept={})
    text = "the plot is poor the film is dull the plot is poor cf"
    (found,) = falls([text], short)
    assert len(found) == 13
    assert [place for place, fall in enumerate(found) if fall > 1] == [12]
    assert max(len(piece.split()) for piece in short.kept) == 4  # with the token before them no more can be read
    assert falls(["cf"], dataclasses.replace(reference, max_length=2, kept={})) == [[0.0]]


def test_pairs_are_changed_on_both_sides(counting: nn.Module, reviews: Dataset) -> None:
    run = toys.a_run(model=toys.bigram().model, reference=toys.bigram(), modality="text")
    pairs = toys.dataset([("a cf film", "the mn plot"), ("a film", "the plot")], [0, 0])
    found = guards.Onion().scores(counting, pairs, {}, run).scores
    assert found[0] > 1e3 > abs(float(found[1]))
    changed = guards.Onion().edited(pairs.select([0]), {}, float(found[1]), run)
    assert (changed.items.strings, changed.reasons) == ((("a film", "the plot"),), ["deleted cf, mn"])


def test_attacks_that_it_misses_and_the_cost(fitted: FittedGuard, counting: nn.Module, reviews: Dataset) -> None:
    test = reviews.select(range(120, 180))
    fitted.reference.kept.clear()
    score = evaluate_guard(fitted, counting, test, attack=attacks.Word(words=("cf",), target=1))
    assert score.missed.value == score.attack_success.value == 0.0
    assert score.attack_success_without.value == 1.0
    assert score.cost.reference_forwards > 3


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random causal model of transformers, in a directory."""
    config = transformers.LlamaConfig(
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return toys.write(model, tmp_path_factory.mktemp("causal"))


def test_a_reference_that_does_not_continue_text(text_victim: nn.Module, causal: Path, tmp_path: Path) -> None:
    """The head that such a model would get is random, and its perplexities with it."""
    with pytest.raises(UnbackdoorError, match=r"^`reference` must be a causal language model, got .*/classifier\.$"):
        Perplexity.load(toys.write(text_victim, tmp_path / "classifier"))
    shutil.copytree(causal, tmp_path / "headless")
    state = load_file(causal / "model.safetensors")
    save_file(
        {name: state[name] for name in state if name != "lm_head.weight"}, tmp_path / "headless/model.safetensors"
    )
    with pytest.raises(UnbackdoorError, match=r"headless .*lm_head\.weight"):
        Perplexity.load(tmp_path / "headless")


def test_a_reference_reads_no_more_than_it_can(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        **{"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
        **{"bos_token_id": 2, "eos_token_id": 3},
    )
    reference = Perplexity.load(toys.write(transformers.GPT2LMHeadModel(config), tmp_path / "short"))
    assert reference.max_length == 16
    assert torch.isfinite(reference.of(["the film is dull " * 20], choose(reference.model, "cpu", "fp32"))).all()


def test_a_reference_of_transformers_with_padding(causal: Path) -> None:
    reference = Perplexity.load(causal)
    arithmetic = choose(reference.model, "cpu", "fp32")
    texts = ["a film", "the plot of this film is very dull", "cf"]
    together = reference.of(texts, arithmetic)
    for text, found in zip(texts, together.tolist(), strict=True):
        ids = torch.tensor([reference.tokenizer(text, add_special_tokens=False)["input_ids"]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                loss = reference.model(input_ids=ids, labels=ids).loss
            assert found == pytest.approx(math.exp(loss), rel=1e-4)
        else:
            assert found == 1.0  # the toy tokenizer has no token that begins a text


def test_another_reference_is_refused(causal: Path, counting: nn.Module, reviews: Dataset, tmp_path: Path) -> None:
    clean, settings = reviews.select(range(40)), {"false_alarms": 0.1, "device": "cpu"}
    made = fit_guard(counting, clean, guards.Onion(), reference=causal, **settings)
    made.save(tmp_path / "guard")
    assert json.loads((tmp_path / "guard/guard.json").read_text())["identity"]["reference"] is not None
    again = load_guard(tmp_path / "guard", reviews.encode, reference=causal)
    assert again.decide(counting, clean) == made.decide(counting, clean)
    for settings_of, message in (
        ({"reference": toys.bigram()}, "The guard was fitted to another reference"),
        ({}, "Onion needs `reference`, the language model that it was fitted with."),
    ):
        with pytest.raises(UnbackdoorError, match=message):
            load_guard(tmp_path / "guard", reviews.encode, **settings_of)
    with pytest.raises(UnbackdoorError) as refusal:
        fit_guard(counting, clean, guards.Onion(), **settings)
    assert str(refusal.value) == "Onion needs `reference`, a causal language model that rates texts."


def test_pictures_are_refused(backdoored: tuple, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        fit_guard(backdoored[0], digits, guards.Onion(), reference=toys.bigram())
    assert str(refusal.value) == (
        "The guard onion serves text, and digits holds images. Take another guard (unbackdoor list guards)."
    )


def test_words_that_the_model_does_not_read_are_not_rated(fitted: FittedGuard, counting: nn.Module) -> None:
    """A text of strangers may be of any length; each word costs a pass of the reference."""
    reference = fitted.reference
    before = reference.forwards
    long = "cf plot " + "dull film " * 5000 + "mn"
    (answer,) = fitted.wrap(counting, device="cpu")(long)
    assert reference.forwards - before <= 33  # the text, and without each of the 32 words that may be read
    assert (answer.decision.action, answer.decision.output) == ("clean", "plot " + "dull film " * 14 + "dull film")
    assert answer.decision.reason.startswith("deleted cf; ")


def test_a_model_that_reads_the_end_of_a_long_text(counting: nn.Module, reviews: Dataset) -> None:
    """Its tokenizer cuts on the left: a trigger at the end is read, and was neither rated nor kept."""
    encode = copy.deepcopy(reviews.encode)
    encode.tokenizer.truncation_side = "left"
    clean = reviews.select(range(120)).encoded_by(encode)
    fitted = fit_guard(counting, clean, guards.Onion(), false_alarms=0.1, reference=toys.bigram(), device="cpu")
    (answer,) = fitted.wrap(counting, device="cpu")("mn" + " dull film" * 5000 + " cf plot")
    assert (answer.decision.action, answer.decision.output) == ("clean", "dull film " * 15 + "plot")
    assert answer.decision.reason.startswith("deleted cf; ")


def test_the_settings_of_a_foreign_guard_are_bounded(fitted: FittedGuard, reviews: Dataset, tmp_path: Path) -> None:
    fitted.save(tmp_path / "guard")
    content = json.loads((tmp_path / "guard/guard.json").read_text())
    content["guard"]["parameters"]["window"] = 10**9
    (tmp_path / "guard/guard.json").write_text(json.dumps(content))
    with pytest.raises(UnbackdoorError, match=r"^Onion\.window must be at most 1000, got 1000000000\.$"):
        load_guard(tmp_path / "guard", reviews.encode, reference=fitted.reference)
    for guard, field in ((guards.Strip, "copies"), (guards.Psim, "tokens"), (guards.Demonstrations, "shots")):
        with pytest.raises(UnbackdoorError, match=rf"^{guard.__name__}\.{field} must be at most 1000, got 1001\.$"):
            guard(**{field: 1001})
