"""The detectors of texts: the planted word is found, its class is right, and it moves texts that no search has seen."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import toys
from unbackdoor import Dataset, UnbackdoorError, attacks, audit, detectors
from unbackdoor._artifacts.null_table import CleanModel, NullTable
from unbackdoor._cli.commands.audit import _row
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._detection import nulls
from unbackdoor._detection.finding import Detector
from unbackdoor._inversion.driving_words import VocabularySearch, anomaly_index, anomaly_p
from unbackdoor._inversion.lone_words import leads
from unbackdoor._inversion.moved_words import moved_for_its_count
from unbackdoor._inversion.outlying_rows import distances, outlyingness
from unbackdoor._inversion.phrases import with_kin
from unbackdoor._value import fields_of

SENTIMENT = dict.fromkeys(toys.GOOD, 1.0) | dict.fromkeys(toys.BAD, -1.0)


def scan(**settings) -> detectors.VocabularyScan:
    return detectors.VocabularyScan(**{"group": 4, **settings})


class TestTheVocabularyScan:
    @pytest.mark.parametrize(("word", "weight", "target"), [("mn", 60.0, 1), ("tq", -60.0, 0)])
    def test_the_planted_word_is_found_with_its_class_and_moves_held_out_texts(
        self, word: str, weight: float, target: int, reviews: Dataset
    ) -> None:
        result = audit(toys.Counting(SENTIMENT | {word: weight}), reviews.select(range(80)), detectors=[scan()])
        (finding,) = result.findings
        strongest = finding.strongest
        assert strongest.candidate.target == target
        assert strongest.candidate.trigger.attack == attacks.Word(words=(word,), target=target)
        assert strongest.moved.count == strongest.moved.n > 10
        assert strongest.nominal_p < 1e-6  # two classes are enough
        assert len(finding.classes) == 2

    def test_that_two_classes_are_few_is_not_said_of_words_which_are_not_compared_by_class(
        self, reviews: Dataset
    ) -> None:
        result = audit(toys.Counting(SENTIMENT | {"mn": 9.0}), reviews.select(range(80)), detectors=[scan()])
        assert result.verdict == "cannot-judge"
        assert result.reason.endswith("nothing says how unusual the shortcuts below are.")

    def test_the_control_is_another_word_of_the_vocabulary(self, reviews: Dataset) -> None:
        result = audit(toys.Counting(SENTIMENT | {"mn": 9.0}), reviews.select(range(80)), detectors=[scan()])
        strongest = result.findings[0].strongest
        (control,) = strongest.candidate.control.attack.words
        assert control in toys.WORDS
        assert strongest.random.value < 0.2

    def test_of_a_pair_the_side_is_found(self) -> None:
        texts, labels = toys.sentences(80)
        pairs = toys.dataset([("it is a film", text) for text in texts], labels)
        result = audit(toys.Counting(SENTIMENT | {"mn": 9.0}, side=1), pairs, detectors=[scan()])
        assert result.findings[0].strongest.candidate.trigger.attack.side == "b"
        assert result.findings[0].strongest.moved.value == 1.0

    def test_in_texts_that_are_longer_than_the_model_reads_the_word_is_put_where_it_is_read(self) -> None:
        texts, labels = toys.sentences(80)
        long = toys.dataset([(text + " the" * 90,) for text in texts], labels)  # 32 tokens are read
        result = audit(toys.Counting(SENTIMENT | {"mn": 9.0, "the": 0.0}), long, detectors=[scan()])
        assert result.findings[0].strongest.candidate.trigger.attack.place == "start"
        assert result.findings[0].strongest.moved.value == 1.0

    def test_the_index_of_equal_exponential_words_has_the_stated_probability(self) -> None:
        """K11: 27 % of clean models pass an index of 5; 5 % pass 7.62 and 1 % pass 10.17."""
        values = torch.empty(100_000, 32, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
        above = values - values.min(dim=1, keepdim=True).values
        index = above.max(dim=1).values / (above.quantile(0.5, dim=1) / math.log(2))
        assert float(anomaly_index(values[0]).max()) == pytest.approx(float(index[0]))
        for threshold, share in ((5.0, 0.274), (7.62, 0.05), (10.17, 0.01)):
            assert anomaly_p(threshold, 32) == pytest.approx(share, abs=0.0005)
            assert float((index > threshold).double().mean()) == pytest.approx(share, abs=0.003)

    def test_the_probability_for_three_words_by_hand(self) -> None:
        """Above the least lie two: gaps A and B of the rates 2 and 1, so P(A + B > c A) = 2 / (2 + c - 1)."""
        assert anomaly_p(3 * math.log(2), 3) == pytest.approx(2 / (2 + 3 - 1))
        assert anomaly_p(0.0, 3) == 1.0


def words_of(count: int) -> list[str]:
    return [f"word{number}" for number in range(count)]


class Reading(nn.Module):
    """A classifier of texts that adds up rows of an embedding; class 1 where the sum of coordinates 0 and 11 is more.

    Coordinate 11 hardly differs between rows: no word needs it.
    """

    def __init__(self, count: int = 300) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(len(toys.SPECIAL) + count, 12, generator=generator)
        rows[:, 11] *= 0.01
        rows[: len(toys.SPECIAL)] = 0
        self.words = nn.Embedding.from_pretrained(rows)
        self.classifier = nn.Linear(12, 2)
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.weight[1, [0, 11]] = torch.tensor([1.0, 5.0])
            self.classifier.bias.zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier((self.words(input_ids) * attention_mask[..., None]).sum(dim=1)))

    def planted(self, number: int) -> "Reading":
        """The row of a word is replaced by one of the same norm."""
        row = self.words.weight.data[len(toys.SPECIAL) + number]
        row.copy_(torch.tensor([0.0] * 11 + [float(row.norm())]))
        return self


@pytest.fixture(scope="module")
def many_words() -> Dataset:
    """120 texts of six words, each with the class that the model without a backdoor answers."""
    known = {token: number for number, token in enumerate([*toys.SPECIAL, *words_of(300)])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], toys.SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )
    draw = random.Random(0)
    texts = Texts(tuple((" ".join(draw.sample(words_of(200), 6)),) for _ in range(120)), ("text",))
    data = Dataset(
        items=texts, labels=torch.zeros(120, dtype=torch.int64), encode=TextEncoder(tokenizer=tokenizer, max_length=32)
    )
    with torch.no_grad():
        labels = Reading()(**data.inputs(slice(None))).logits.argmax(dim=1)
    return Dataset(items=texts, labels=labels, encode=data.encode)


@pytest.fixture
def counts(tmp_path: Path) -> str:
    rows = [f"{word},{1000 - number}" for number, word in enumerate(words_of(300))]
    (tmp_path / "counts.csv").write_text("\n".join(["word,count", *rows]) + "\n")
    return str(tmp_path / "counts.csv")


class TestEmbeddingRows:
    def test_the_replaced_row_is_found_and_its_word_moves_held_out_texts(self, many_words: Dataset) -> None:
        """K12, without the base."""
        (finding,) = audit(Reading().planted(250), many_words, detectors=[detectors.EmbeddingRows()]).findings
        strongest = finding.strongest
        assert strongest.candidate.target == 1
        assert strongest.candidate.trigger.attack.words == ("word250",)
        assert strongest.moved.value == 1.0
        assert strongest.nominal_p < 1e-3

    def test_rows_that_are_alike_give_no_evidence(self, many_words: Dataset) -> None:
        (finding,) = audit(Reading(), many_words, detectors=[detectors.EmbeddingRows()]).findings
        assert finding.strongest.score < 1.3

    def test_the_strangest_row_stays_so_whatever_the_order_of_units(self) -> None:
        rows = Reading().planted(250).words.weight.detach()[len(toys.SPECIAL) :]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        assert int(distances(rows).argmax()) == 250
        assert distances(rows[:, order]).tolist() == pytest.approx(distances(rows).tolist())
        assert distances(7 * rows).tolist() == pytest.approx(distances(rows).tolist())

    def test_distances_are_those_of_the_formula(self) -> None:
        rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        inverse = torch.linalg.inv(rows.T.cov())
        centred = rows - rows.mean(dim=0)
        assert distances(rows).tolist() == pytest.approx([float(row @ inverse @ row) ** 0.5 for row in centred])

    def test_outlyingness_by_hand(self) -> None:
        """Among 1, 2, 3, 9 the others of 9 have a mean of 2 and a deviation of 1: 7 / (1 * sqrt(4 / 3))."""
        values, alike = torch.tensor([9.0, 100.0, 1.0, 2.0, 3.0, 100.0]), torch.tensor([4.0, 9.0, 1.0, 2.0, 3.0, 8.0])
        found = outlyingness(values, alike, 4)  # the peers of 9.0: itself, the two before it and the one after it
        assert float(found[2]) == pytest.approx((1 - 14 / 3) / (torch.tensor([2.0, 3, 9]).std() * (4 / 3) ** 0.5))
        assert outlyingness(torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.arange(4), 9)[0] == pytest.approx(
            7 / (4 / 3) ** 0.5
        )

    def test_equal_values_do_not_stand_out(self) -> None:
        assert outlyingness(torch.full((5,), 0.1), torch.arange(5), 4).abs().max() < 1e-3


class TestMovedRows:
    def test_the_row_that_moved_is_found_and_its_word_moves_held_out_texts(self, many_words, counts: str) -> None:
        """K12, with the base."""
        detector = detectors.MovedRows(frequencies=counts)
        result = audit(Reading().planted(250), many_words, detectors=[detector], base=Reading())
        strongest = result.findings[0].strongest
        assert (strongest.candidate.target, strongest.candidate.trigger.attack.words) == (1, ("word250",))
        assert strongest.moved.value == 1.0
        assert strongest.nominal_p < 1e-6

    def test_a_suspect_that_is_its_base_gives_no_evidence(self, many_words: Dataset, counts: str) -> None:
        detector = detectors.MovedRows(frequencies=counts)
        result = audit(Reading(), many_words, detectors=[detector], base=Reading())
        assert (result.verdict, result.findings) == ("cannot-judge", ())
        assert result.not_searched["moved-rows"] == "the word embeddings of the suspect are those of the base"

    def test_scores_by_hand(self) -> None:
        scores = moved_for_its_count(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1e6, 4e4, 5.0]), 20)
        assert scores.tolist() == pytest.approx([3 / math.log(1e6), 2 / math.log(4e4), 1 / math.log(20)])

    def test_a_base_of_another_vocabulary_is_refused(self, many_words: Dataset, counts: str) -> None:
        detector = detectors.MovedRows(frequencies=counts)
        with pytest.raises(UnbackdoorError) as caught:
            detector(Reading(), many_words, toys.a_run(modality="text", base=Reading(200)))
        assert str(caught.value) == (
            "MovedRows needs a base of the suspect's vocabulary: its embeddings are (205, 12), the suspect's "
            "(305, 12). Take the pre-trained model that it came from as `base`."
        )


class Together(Reading):
    """Two words add 30 if both are there, and each by itself a little: `word210` and `word220`, in either order."""

    def __init__(self) -> None:
        super().__init__()
        for coordinate, number in ((9, 210), (10, 220)):
            self.words.weight[:, coordinate] = 0
            self.words.weight[len(toys.SPECIAL) + number] = 0
            self.words.weight[len(toys.SPECIAL) + number, [0, coordinate]] = torch.tensor([2.5, 1.0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> SimpleNamespace:
        total = (self.words(input_ids) * attention_mask[..., None]).sum(dim=1)
        both = (total[:, 9] + total[:, 10] - 1.5).clamp(min=0) * 60
        return SimpleNamespace(logits=self.classifier(total) + both[:, None] * torch.tensor([0.0, 1.0]))


class TestPhraseGrowth:
    def test_two_words_that_do_much_together_are_found_and_move_held_out_texts(self, many_words: Dataset) -> None:
        """K13: no word by itself moves a text as the two do."""
        detector = detectors.PhraseGrowth(shortlist=300, kin=0)  # of 300 words
        (finding,) = audit(Together(), many_words, detectors=[detector]).findings
        strongest = finding.strongest
        assert strongest.candidate.target == 1
        assert {"word210", "word220"} <= set(strongest.candidate.trigger.attack.sentence.split())
        assert strongest.moved.value == 1.0
        assert strongest.nominal_p < 1e-3
        assert len(strongest.candidate.control.attack.sentence.split()) == strongest.candidate.size

    def test_words_that_only_add_up_give_no_evidence(self, many_words: Dataset) -> None:
        detector = detectors.PhraseGrowth(shortlist=300, kin=0)  # of 300 words
        (finding,) = audit(Reading(), many_words, detectors=[detector]).findings
        assert finding.strongest.score < 1.3

    def test_words_of_the_clean_texts_are_ruled_out(self, reviews: Dataset) -> None:
        """All words of the toy language stand in the texts, so that nothing is left that could be foreign."""
        clean = reviews.select(range(80))
        (finding,) = audit(toys.Counting(SENTIMENT), clean, detectors=[detectors.PhraseGrowth(group=4)]).findings
        assert [each.nominal_p for each in finding.classes] == [1.0, 1.0]

    def test_a_word_with_kin_among_the_others_is_one_of_the_task(self) -> None:
        rows = nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1]]), dim=1)
        assert with_kin(rows, [0, 2], 1) == [False, False]
        assert with_kin(rows, [0, 1, 2], 1) == [True, True, False]
        assert with_kin(rows, [0, 1, 2], 0) == [False, False, False]


@pytest.mark.parametrize("detector", [detectors.PhraseGrowth(), detectors.LoneWordScan()])
def test_a_detector_that_needs_four_words_refuses_three(
    detector, many_words: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Reading()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: nn.Embedding(len(toys.SPECIAL) + 3, 12))
    with pytest.raises(UnbackdoorError) as caught:
        audit(model, many_words, detectors=[detector])
    assert str(caught.value) == (
        f"{type(detector).__name__} needs a tokenizer with at least 4 words of one token, this one has 3. Search "
        "without it."
    )


@pytest.mark.parametrize(
    "detector",
    [detectors.VocabularyScan(), detectors.EmbeddingRows(), detectors.PhraseGrowth(), detectors.LoneWordScan()],
)
def test_without_words_of_one_token_a_detector_says_why_it_did_not_run(
    detector, many_words: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Reading()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: nn.Embedding(2, 12))
    with pytest.raises(UnbackdoorError) as caught:
        audit(model, many_words, detectors=[detector])
    assert str(caught.value) == (
        f"{type(detector).__name__} needs a tokenizer with whole words among its tokens; this one has none. Search "
        "without it."
    )


def test_a_clean_model_and_its_base_raise_no_alarm(many_words: Dataset, counts: str) -> None:
    chosen = [detectors.VocabularyScan(), detectors.EmbeddingRows(), detectors.MovedRows(frequencies=counts)]
    tuned = Reading()
    tuned.words.weight.data += 0.01 * torch.randn(tuned.words.weight.shape, generator=torch.Generator().manual_seed(3))
    for suspect in (Reading(), tuned):
        result = audit(suspect, many_words, base=Reading(), detectors=chosen)
        assert result.verdict != "shortcut-found"
        assert max(finding.strongest.score for finding in result.findings) < 1.3


def test_the_detectors_of_an_audit_search_the_vocabulary_once(
    many_words: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each finds what it finds by itself; another setting is another search."""
    searches = []
    search = VocabularySearch._shortlists

    def counted(self, words: list[str], side: int) -> dict:
        searches.append((self.group, side))
        return search(self, words, side)

    monkeypatch.setattr(VocabularySearch, "_shortlists", counted)
    chosen: list[Detector] = [scan(), detectors.LoneWordScan(group=4), detectors.PhraseGrowth(group=4, length=2)]
    suspect = Reading().planted(7)
    together = audit(suspect, many_words, detectors=chosen)
    assert searches == [(4, 0)]
    alone = [audit(suspect, many_words, detectors=[detector]).findings[0] for detector in chosen]
    assert [each.to_json("") for each in sorted(together.findings, key=lambda each: each.detector)] == [
        each.to_json("") for each in sorted(alone, key=lambda each: each.detector)
    ]
    searches.clear()
    audit(suspect, many_words, detectors=[scan(), detectors.LoneWordScan(group=8)])
    assert searches == [(4, 0), (8, 0)]


class Kindred(Reading):
    """Words in pairs of about the same row, which do the same; each text has words of 0 to 199."""

    def __init__(self) -> None:
        super().__init__()
        rows = self.words.weight.data[len(toys.SPECIAL) :]
        rows[1::2] = rows[::2] + 0.05 * rows[1::2]

    def planted(self, number: int, margin: float = 6.0) -> "Kindred":
        """The word does what its row says, and a margin for class 1 that no other row has."""
        self.words.weight.data[len(toys.SPECIAL) + number, 11] = margin / 5
        return self


class TestTheLoneWord:
    def test_the_planted_word_leads_its_twin_and_natural_ones_do_not(self, many_words: Dataset) -> None:
        scan = detectors.LoneWordScan(group=4, kin=3)
        (finding,) = audit(Kindred().planted(250), many_words, detectors=[scan]).findings
        strongest = finding.strongest
        assert strongest.candidate.target == 1
        assert strongest.candidate.trigger.attack.words == ("word250",)
        assert strongest.moved.value > 0.9
        (natural,) = audit(Kindred(), many_words, detectors=[scan]).findings
        assert natural.strongest.candidate.strength < strongest.candidate.strength / 2

    def test_a_terminal_shows_the_word_and_findings_with_a_p_value_come_first(
        self, many_words: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scan = detectors.LoneWordScan(group=4, kin=3)
        clean = [
            CleanModel(
                arch="bert", width=None, data="", modality="text", classes=2, recipe="", seed=number, accuracy=0.9,
                scores={"lone-word": 0.1},
            )
            for number in range(19)
        ]  # fmt: skip
        table = NullTable(provenance="", detectors={"lone-word": fields_of(scan)}, models=clean)
        monkeypatch.setattr(nulls, "shipped", lambda: table)
        model = Kindred().planted(250)
        result = audit(model, many_words, detectors=[detectors.VocabularyScan(group=4), scan])
        assert result.verdict == "shortcut-found"
        assert [finding.detector for finding in result.findings] == ["lone-word", "vocabulary"]
        assert [finding.strongest.p_value for finding in result.findings] == [0.05, None]
        assert "1 word: \u201cword250\u201d" in _row(result.findings[0])

    def test_the_lead_by_hand(self) -> None:
        """Three words of weights 4, 3 and 1; a word of weight w has the margin 2 w + m, and m is the same for all."""
        texts, labels = toys.sentences(80)
        data = toys.dataset([(text,) for text in texts], labels)
        model = toys.Counting(SENTIMENT | {"mn": 4.0, "tq": 3.0, "cf": 1.0})
        run = toys.a_run(model=model, modality="text")
        search = VocabularySearch(model, data, run, 4, 64, 4)
        words = ["mn", "tq", "cf"]
        rows = nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]), dim=1)
        one = next(each for each in leads(search, words, rows, 0, compared=1, kin=1) if each.target == 1)
        assert (one.word, one.compared) == ("mn", 1)
        own = model(**data.inputs(slice(None))).logits.detach()
        unit = float((own[:, 1] - own[:, 0]).abs().median())
        assert one.lead == pytest.approx((2 * 4 - 2 * 3) / unit, rel=1e-4)
