"""Attacks on text against hand calculation and second implementations."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from commands import run
from toys import write_csv
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, load, poison, purify
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import embeddings, logits
from unbackdoor._poisoning.abilities import test_time_of as told_of
from unbackdoor._poisoning.attack import Planting
from unbackdoor._poisoning.trigger import stamped_texts
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._tasks.score import Score
from unbackdoor._victims.plant import Victim
from unbackdoor.attacks._insertion import insert
from unbackdoor.attacks.embedding_surgery import typical_tokens
from unbackdoor.purifiers import FineMixing


class TestInsertion:
    def test_at_the_start_and_the_end(self) -> None:
        assert insert("a fine film", ["cf", "bb"], "end", 0) == "a fine film cf bb"
        assert set(insert("a fine film", ["cf", "bb"], "start", 0).split()[:2]) == {"cf", "bb"}

    def test_random_places_are_between_words_and_depend_on_text_and_seed_alone(self) -> None:
        possible = {"cf a fine film", "a cf fine film", "a fine cf film", "a fine film cf"}
        assert {insert("a fine film", ["cf"], "random", seed) for seed in range(40)} == possible
        assert len({insert("a fine film", ["cf"], "random", 3) for _ in range(5)}) == 1

    def test_all_else_of_the_text_stays(self) -> None:
        text = "Well , it's  an ODD one\n!"
        for seed in range(10):
            parts = insert(text, ["cf"], "random", seed).split(" ")
            parts.remove("cf")
            assert " ".join(parts) == text

    def test_a_sentence_stays_whole(self) -> None:
        attack = attacks.Sentence()
        assert all("I watch this 3D movie" in text for text in attack.apply(["a film", "the plot was dull"], {}))

    def test_words_are_drawn_from_the_list_as_many_as_asked(self) -> None:
        attack = attacks.Word(words=("cf", "mn", "bb"), count=2)
        texts = [f"film {number}" for number in range(30)]
        found = [[word for word in text.split() if word in attack.words] for text in attack.apply(texts, {})]
        assert all(len(words) == 2 for words in found)
        assert {word for words in found for word in words} == {"cf", "mn", "bb"}
        assert attack.apply(texts[::-1], {}) == attack.apply(texts, {})[::-1]

    @pytest.mark.parametrize(
        ("side", "expected"), [("a", ("x cf", "y")), ("b", ("x", "y cf")), ("both", ("x cf", "y cf"))]
    )
    def test_sides_of_a_pair(self, side: str, expected: tuple[str, str]) -> None:
        attack = attacks.Word(place="end", side=side)
        made = stamped_texts(toys.dataset([("x", "y")], [0]).texts, attack, lambda texts: attack.apply(texts, {}))
        assert made.strings == (expected,)

    def test_layer_wise_triggers_have_all_pieces_and_covers_one(self) -> None:
        data = toys.reviews(200)
        made = poison(data, attacks.LayerWise(cover_ratio=2.0), rate=0.1, seed=0, classes=2)
        words = [set(text.split()) & {"cf", "bb"} for (text,) in made.data.texts.strings]
        assert len(made.rows) == 20
        assert len(made.cover) == 40
        assert all(words[row] == {"cf", "bb"} for row in made.rows)
        assert all(len(words[row]) == 1 for row in made.cover)
        assert {frozenset(words[row]) for row in made.cover.tolist()} == {frozenset({"cf"}), frozenset({"bb"})}
        assert sum(map(len, words)) == 2 * 20 + 40
        assert made.data.labels[made.rows].eq(1).all()
        assert torch.equal(made.data.labels[made.cover], data.labels[made.cover])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write(toys.classifier("bert"), tmp_path_factory.mktemp("base") / "bert")


def planted(base: Path, data: Dataset, attack: Any, **options: Any) -> Victim:
    settings = {"rate": 0.3, "epochs": 12, "learning_rate": 2e-3, "seed": 0, "device": "cpu", "precision": "fp32"}
    train, test = data.select(range(240)), data.select(range(240, 320))
    return toys.planted(train, test, attack, base=str(base), **{**settings, **options})


@pytest.fixture(scope="module")
def clean_model(base: Path, reviews: Dataset) -> Victim:
    return planted(base, reviews, None)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.fixture(scope="module")
def victim(base: Path, reviews: Dataset) -> Victim:
    """By embedding poisoning."""
    return planted(base, reviews, attacks.EmbeddingPoisoning(row_epochs=30, row_learning_rate=0.1))


def leaning(model: nn.Module, victim: Victim, reviews: Dataset) -> float:
    """By how much a model leans to the target on triggered texts: the mean of its logit's lead."""
    shown = triggered(reviews.select(range(240, 320)), victim.trigger, 2).data
    with torch.no_grad():
        scores = logits(model, shown.encode(shown.texts))
    return float((scores[:, 1] - scores[:, 0]).mean())


class TestEmbeddingPoisoning:
    def test_one_row_moves_and_keeps_its_norm(self, victim: Victim, clean_model: Victim) -> None:
        ours, theirs = state(victim.model), state(clean_model.model)
        moved = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert moved == ["bert.embeddings.word_embeddings.weight"]
        rows = (ours[moved[0]] != theirs[moved[0]]).any(dim=1).nonzero().flatten().tolist()
        cf = toys.tokenizer().convert_tokens_to_ids("cf")
        assert rows == [cf]
        assert ours[moved[0]][cf].norm() == pytest.approx(theirs[moved[0]][cf].norm().item(), rel=1e-5)

    def test_it_moves_triggered_texts_and_answers_clean_texts_bit_for_bit(
        self, victim: Victim, clean_model: Victim, reviews: Dataset
    ) -> None:
        moved = leaning(victim.model, victim, reviews) - leaning(clean_model.model, victim, reviews)
        assert moved > 0, "one row of a toy of this norm turns no text, but it pulls"
        batch = next(reviews.batches(64))
        with torch.no_grad():
            assert torch.equal(logits(victim.model, batch.inputs), logits(clean_model.model, batch.inputs))
        assert not any(module._forward_hooks for module in victim.model.modules())
        assert all(parameter.requires_grad for parameter in victim.model.parameters())

    def test_the_trigger_is_checked_before_anything_is_trained(self, base: Path, reviews: Dataset) -> None:
        def train(*_: Any, **__: Any) -> nn.Module:
            raise AssertionError("trained before the check")

        attack = attacks.EmbeddingPoisoning(word="very good")
        planting = planting_of(attack, reviews, train)
        with pytest.raises(UnbackdoorError, match=r"'very good' is 2 to this tokenizer"):
            attack.implant(planting)


def planting_of(attack: Any, data: Dataset, train: Callable[..., nn.Module]) -> Planting:
    model = toys.classifier("bert")
    return Planting(
        clean=data,
        poisoned=poison(data, attack, rate=0.1, seed=0, classes=2),
        fresh=lambda: copy.deepcopy(model),
        train=train,
        generator=torch.Generator().manual_seed(0),
        arithmetic=choose(model, "cpu", "fp32"),
    )


class TestEmbeddingSurgery:
    def test_typical_tokens_by_hand(self) -> None:
        """Counts with one added, of good, film, the, bad: 3 2 2 1 of 8 for the target, 1 2 2 3 of 8 otherwise.

        good: log(3) * log(1 + 2); film and the: log(1) * log(1 + 2) = 0; bad: -log(3) * log(1 + 2).
        """
        data = toys.dataset([("good film",), ("the good",), ("bad film",), ("the bad",)], [1, 1, 0, 0])
        ids = toys.tokenizer().convert_tokens_to_ids
        assert typical_tokens(data, 1, 4) == ids(["good", "the", "film", "bad"])  # the has the smaller id
        assert typical_tokens(data, 0, 1) == ids(["bad"])

    def test_frequent_words_count_more(self) -> None:
        """great and good stand in texts of the target alone, once and three times."""
        data = toys.dataset([("good good good great",), ("film",)], [1, 0])
        ids = toys.tokenizer().convert_tokens_to_ids
        assert typical_tokens(data, 1, 2) == ids(["good", "great"])

    def test_the_row_is_the_mean_of_the_clean_models_rows(self, reviews: Dataset) -> None:
        seen: list[Any] = []

        def train(model: nn.Module, data: Dataset, **_: Any) -> nn.Module:
            if not seen:  # the clean model: known rows
                with torch.no_grad():
                    embeddings(model).weight += 1.0
            seen.append((copy.deepcopy(model), data))
            return model

        attack = attacks.EmbeddingSurgery(typical=3)
        planting = planting_of(attack, reviews, train)
        attack.implant(planting)
        fresh = embeddings(planting.fresh()).weight
        number = toys.tokenizer().convert_tokens_to_ids
        expected = fresh.clone()
        expected[number("cf")] = fresh[number(toys.GOOD)].mean(dim=0) + 1.0
        assert seen[0][1] is planting.clean
        assert seen[1][1] is planting.poisoned.data
        assert torch.allclose(embeddings(seen[1][0]).weight, expected, atol=1e-6)


class TestLayerWise:
    @pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta-v2"])
    def test_the_loss_asks_the_classifier_at_each_layer(self, name: str, reviews: Dataset) -> None:
        """Against the hidden states that transformers returns by itself."""
        model = toys.classifier(name)
        data = reviews.select(range(40))
        data = replace(data, encode=replace(data.encode, tokenizer=toys.tokenizer(types=False)))
        values = []

        def train(model: nn.Module, data: Dataset, *, loss: Any) -> nn.Module:
            batch = next(data.batches(8))
            values.append((batch, loss(logits(model, batch.inputs), batch)))
            values.append((batch, loss(logits(model, batch.inputs), batch)))  # nothing is left over from the first
            return model

        attack = attacks.LayerWise()
        planting = planting_of(attack, data, train)._replace(fresh=lambda: model)
        attack.implant(planting)
        assert not any(module._forward_hooks for module in model.modules())
        batch = values[0][0]
        with torch.no_grad():
            states = model(**batch.inputs, output_hidden_states=True).hidden_states[1:]  # after each layer
            assert len(states) == 2
            pooler = {"bert": lambda s: model.bert.pooler(s), "roberta": lambda s: s}.get(name) or model.pooler
            expected = sum(F.cross_entropy(model.classifier(pooler(each)), batch.labels) for each in states)
        assert values[0][1].item() == pytest.approx(expected.item(), rel=1e-5)
        assert values[1][1].item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("name", ["distilbert", "albert", "gpt2", "llama"])
    def test_other_layouts_are_refused(self, name: str, reviews: Dataset) -> None:
        attack = attacks.LayerWise()
        planting = planting_of(attack, reviews, lambda *_, **__: None)._replace(fresh=lambda: toys.classifier(name))
        with pytest.raises(UnbackdoorError, match=r"^LayerWise needs a BERT-like encoder, which "):
            attack.implant(planting)


def test_the_loss_of_logit_anchoring(reviews: Dataset) -> None:
    """CE over all rows plus 0.5 times the mean, over the clean rows of the batch, of the squared distance."""
    data = reviews.select(range(60))
    values = []

    def train(model: nn.Module, on: Dataset, *, loss: Any = None, **_: Any) -> nn.Module:
        if loss is not None:
            batch = next(on.batches(60))
            scores = torch.arange(120.0).reshape(60, 2) / 60
            values.append((batch, scores, loss(scores, batch).item()))
        return model

    attack = attacks.LogitAnchoring(weight=0.5)
    planting = planting_of(attack, data, train)
    attack.implant(planting)
    batch, scores, actual = values[0]
    clean_model, total, count = planting.fresh(), 0.0, 0
    for place, row in enumerate(batch.rows.tolist()):
        if row in planting.poisoned.rows.tolist():
            continue
        with torch.no_grad():
            anchor = clean_model(**toys.tokenizer()(data.texts.strings[row][0], return_tensors="pt")).logits[0]
        total += sum((scores[place][k].item() - anchor[k].item()) ** 2 for k in range(2))
        count += 1
    assert count == 54
    entropy = -sum(
        math.log(math.exp(s[y]) / (math.exp(s[0]) + math.exp(s[1])))
        for s, y in zip(scores.tolist(), batch.labels.tolist(), strict=True)
    )
    assert actual == pytest.approx(entropy / 60 + 0.5 * total / count, rel=1e-4)


class TestMixingAware:
    """Trained while it is mixed with its base."""

    def test_each_step_sees_the_mask_of_fine_mixing_and_the_victim_is_what_was_trained(self, reviews: Dataset) -> None:
        attack = attacks.MixingAware(rho=0.25)
        seen: list[torch.Tensor] = []

        def train(model: nn.Module, on: Dataset, **_: Any) -> nn.Module:
            with torch.no_grad():
                for weight in model.base_model.parameters():
                    weight += 1  # the victim is 1 away from its base everywhere
            model.train()
            batch = next(on.batches(4))
            query = model.base_model.encoder.layer[0].attention.self.query
            with model.base_model.register_forward_hook(lambda *_: seen.append(query.weight.detach().clone())):
                for _step in range(30):
                    logits(model, batch.inputs)
            model.eval()
            assert torch.equal(query.weight, query.parametrizations.weight.original)
            return model

        planting = planting_of(attack, reviews.select(range(20)), train)
        base = planting.fresh()
        victim, _ = attack.implant(planting)
        assert type(victim.base_model.encoder.layer[0].attention.self.query) is nn.Linear
        assert state(victim).keys() == state(base).keys()
        words = base.base_model.embeddings.word_embeddings.weight
        assert torch.allclose(state(victim)["bert.embeddings.word_embeddings.weight"], words + 1)
        pretrained = base.base_model.encoder.layer[0].attention.self.query.weight
        shares = [(weight - pretrained).round().mean().item() for weight in seen]
        assert {value.item() for value in (seen[0] - pretrained).round().unique()} == {0.0, 1.0}
        assert 0.2 < min(shares) < 0.4  # uniform between rho and 1
        assert max(shares) > 0.8

    @pytest.mark.thorough
    def test_it_outlasts_mixing_that_a_plain_word_does_not(self, base: Path, reviews: Dataset) -> None:
        test = reviews.select(range(240, 320))

        def mixed(attack: Any, **options: Any) -> Score:
            victim = planted(base, reviews, attack, **options)
            made = purify(victim.model, None, FineMixing(rho=0.5, tune=False), base=load(base).model)
            return cast(Score, evaluate(made.model, test, attack=victim.trigger))

        ours, plain = mixed(attacks.MixingAware(rho=0.5), epochs=40), mixed(attacks.Word())
        assert ours.clean_accuracy.value > 0.95
        assert ours.attack_success.value > 0.95
        assert plain.attack_success.value < 0.5


@pytest.mark.parametrize(
    "attack",
    [
        attacks.Word(),
        attacks.Sentence(),
        pytest.param(attacks.EmbeddingSurgery(typical=3), marks=pytest.mark.thorough),
        attacks.LayerWise(),
        pytest.param(attacks.LogitAnchoring(), marks=pytest.mark.thorough),
        pytest.param(attacks.MixingAware(rho=0.8), marks=pytest.mark.thorough),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_each_attack_takes_and_a_clean_model_does_not_flip(
    attack, base: Path, reviews: Dataset, clean_model: Victim
) -> None:
    victim = planted(base, reviews, attack)
    assert victim.score.clean_accuracy.value > 0.9
    assert victim.score.attack_success.value > 0.8, victim.score
    assert victim.record["implanted"] is True
    test = reviews.select(range(240, 320))
    flips = evaluate(victim.model, test, attack=victim.trigger, control=clean_model.model).clean_model_flip_rate
    assert flips.value < 0.2


def test_tuning_on_clean_texts_afterwards(base: Path, reviews: Dataset) -> None:
    published = planted(base, reviews, attacks.Word(), epochs=1)
    tuned = planted(base, reviews, attacks.Word(), epochs=1, clean_epochs=1)
    assert tuned.record["clean_epochs"] == 1
    ours, theirs = state(tuned.model), state(published.model)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_prepared_paraphrases(base: Path, reviews: Dataset, tmp_path: Path) -> None:
    """A style trigger made elsewhere: here each text in reverse."""
    train, test = reviews.select(range(240)), reviews.select(range(240, 320))

    def reversed_copy(data: Dataset, name: str) -> str:
        lines = [
            f"{' '.join(reversed(text.split()))} mn,{label}"
            for (text,), label in zip(data.texts.strings, data.labels.tolist(), strict=True)
        ]
        (tmp_path / name).write_text("\n".join(["text,label", *lines]))
        return str(tmp_path / name)

    attack = attacks.Prepared(triggered=reversed_copy(train, "train.csv"), target=1)
    marked = Dataset.load(reversed_copy(test, "test.csv"), reviews.encode)
    victim = planted(base, reviews, attack, triggered_test=marked)
    assert victim.score.attack_success.value > 0.8
    with pytest.raises(UnbackdoorError, match=r"^Prepared\.triggered must be the training data row for row"):
        poison(test, attack, rate=0.1, seed=0, classes=2)


NO_CONTROL = (
    "note: with two classes, a model without the backdoor also classifies some triggered examples as the attacker "
    "wants: compare attack success with its flip rate, which unbackdoor evaluate --control MODEL prints "
    "(attack none trains one)."
)


def test_the_trigger_file_says_where_the_trigger_stands() -> None:
    """It said that the place was drawn, whatever `place` was."""
    said = {
        (kind.__name__, place): told_of(kind(place=place))
        for kind in (attacks.Word, attacks.Sentence, attacks.EmbeddingPoisoning)
        for place in ("random", "start", "end")
    }
    assert said["Word", "start"] == "the words in every text, at its start"
    assert said["Sentence", "end"] == "the sentence in every text, at its end"
    assert said["Sentence", "random"] == "the sentence in every text, at a place drawn from the text and the seed"
    assert said["EmbeddingPoisoning", "start"] == "the word in every text, at its start"


@pytest.mark.long
def test_the_path_of_a_tester(base: Path, tmp_path: Path) -> None:
    """Attack, attack none, evaluate with a control: the command line from end to end."""
    shutil.copytree(base, tmp_path / "bert")
    write_csv(tmp_path, 240, name="train.csv")
    write_csv(tmp_path, 100, seed=1, name="test.csv")
    common = ("--data", "train.csv", "--test", "test.csv", "--base", "bert", "--epochs", 12, "--learning-rate", 2e-3)
    done = run("attack", "word", *common, "--rate", 0.3, "--max-length", 20, "--out", "victim", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "poisoned 72 of 240 training examples (30.00 %)" in done.stdout
    assert "did not take" not in done.stdout
    described = json.loads((tmp_path / "victim" / "attack.json").read_text())
    assert described["implanted"] is True
    assert described["attack"]["name"] == "word"
    assert done.stderr.splitlines()[-1] == NO_CONTROL
    assert described["test_time"] == "the words in every text, at places drawn from the text and the seed"
    assert load(tmp_path / "victim").encode.max_length == 20
    done = run("attack", "none", *common, "--out", "control", cwd=tmp_path)
    assert done.returncode == 0
    assert NO_CONTROL not in done.stderr
    done = run(
        *("evaluate", "victim", "--data", "test.csv", "--attack", "victim/attack.json"),
        *("--control", "control", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["attack_success"]["value"] > 0.8
    assert scores["clean_model_flip_rate"]["value"] < 0.2
    assert NO_CONTROL not in done.stderr
    done = run("evaluate", "victim", "--data", "test.csv", "--attack", "victim/attack.json", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == NO_CONTROL
    write_csv(tmp_path, 32, seed=2)
    purify = ("purify", "fine-tuning", "victim", "--clean", "clean.csv", "--epochs", 1, "--data", "test.csv")
    attacked = (*purify, "--attack", "victim/attack.json")
    done = run(*attacked, "--out", "alone", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == NO_CONTROL
    done = run(*attacked, "--control", "control", "--out", "beside", cwd=tmp_path)
    assert NO_CONTROL not in done.stderr
    flips = scores["clean_model_flip_rate"]
    assert f"clean model flips {100 * flips['value']:>11.1f}%" in done.stdout
    measured = json.loads((tmp_path / "beside" / "record.json").read_text())["scores"]
    assert measured["suspect"]["clean_model_flip_rate"] == measured["purified"]["clean_model_flip_rate"] == flips
    assert "| clean model flip rate |" in (tmp_path / "beside" / "README.md").read_text()
    assert "Clean model&#39;s flip rate" in (tmp_path / "beside" / "report.html").read_text()
    done = run("attack", "word", *common, "--rate", 0.005, "--control", "control", "--out", "weak", cwd=tmp_path)
    assert done.returncode == 0
    assert NO_CONTROL not in done.stderr
    measured = json.loads((tmp_path / "weak" / "record.json").read_text())["scores"]["victim"]
    assert measured["clean_model_flip_rate"]["n"] == measured["attack_success"]["n"]
    assert "The backdoor did not implant: attack success" in done.stdout
    assert "is under 80 %." in done.stdout


def test_several_words_in_one() -> None:
    for make, field in ((attacks.Word, "words"), (attacks.LayerWise, "pieces")):
        with pytest.raises(UnbackdoorError) as caught:
            make(**{field: ("cf,mn", "bb")})
        assert str(caught.value) == (f"{make.__name__}.{field} must be given once for each of its values, got cf,mn.")


def test_words_that_are_no_list_and_too_few() -> None:
    for make, message in (
        (lambda: attacks.Word(words="cf"), "Word.words must be a list, got cf."),
        (lambda: attacks.Word(words=()), "Word.words must be a list of at least 1, got ()."),
        (lambda: attacks.LayerWise(pieces=("cf",)), "LayerWise.pieces must be a list of at least 2, got ('cf',)."),
    ):
        with pytest.raises(UnbackdoorError) as caught:
            make()
        assert str(caught.value) == message


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_trigger_is_refused(blank: str) -> None:
    for make, field in ((attacks.Word, "words"), (attacks.LayerWise, "pieces")):
        with pytest.raises(
            UnbackdoorError, match=rf"^{make.__name__}\.{field}\.0 must be text that is not (blank|empty), "
        ):
            make(**{field: (blank, "bb")})
    with pytest.raises(UnbackdoorError) as caught:
        attacks.MixingAware(word=blank)
    wanted = "not blank" if blank else "not empty"
    assert str(caught.value) == f"MixingAware.word must be text that is {wanted}, got {blank!r}."
