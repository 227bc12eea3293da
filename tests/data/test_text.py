"""Texts and pairs: read, tokenised once, handed out in batches of like length."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from torch import nn

import toys
from unbackdoor import Dataset, UnbackdoorError, attacks
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._models.arithmetic import choose
from unbackdoor._poisoning.poison import poison
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._tasks.classification import predict

ENCODE = TextEncoder(tokenizer=toys.tokenizer(), max_length=32)
PAIRS = replace(ENCODE, columns=("text_a", "text_b"))
SINGLE = replace(ENCODE, columns=("text",))


def csv(folder: Path, *lines: str) -> str:
    (folder / "d.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "d.csv")


def loaded(folder: Path, *lines: str, encode: TextEncoder = ENCODE, columns: dict[str, str] | None = None) -> Dataset:
    return Dataset.load(csv(folder, *lines), encode, columns=columns)


class TestReading:
    def test_single_texts(self, tmp_path: Path) -> None:
        data = loaded(tmp_path, "text,label", "a good film,1", '"bad, the plot",0')
        assert data.texts.strings == (("a good film",), ("bad, the plot",))
        assert data.labels.tolist() == [1, 0]
        assert data.modality == "text"

    def test_pairs_by_their_names_or_by_columns(self, tmp_path: Path) -> None:
        data = loaded(tmp_path, "text_a,text_b,label", "a film,a movie,1")
        assert data.texts.strings == (("a film", "a movie"),)
        columns = {"text_a": "question", "text_b": "sentence"}
        renamed = loaded(tmp_path, "question,sentence,label", "a film,a movie,1", columns=columns)
        assert renamed.texts.strings == data.texts.strings
        assert renamed.texts.columns == ("text_a", "text_b")

    def test_words_that_others_take_for_missing_cells(self, tmp_path: Path) -> None:
        data = loaded(tmp_path, "text,label", "NA,None", "null,NA", "good,NA")
        assert data.texts.strings == (("NA",), ("null",), ("good",))
        assert data.classes == ("NA", "None")
        assert data.labels.tolist() == [1, 0, 0]

    def test_a_pair_is_tokenised_as_one_input_with_a_separator(self) -> None:
        data = toys.dataset([("a film", "good plot")], [0])
        number = toys.tokenizer().convert_tokens_to_ids
        expected = number(["[CLS]", "a", "film", "[SEP]", "good", "plot", "[SEP]"])
        tokens = data.encode(data.texts)
        assert tokens["input_ids"].tolist() == [expected]
        assert tokens["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]

    @pytest.mark.parametrize(
        ("lines", "encode", "columns", "message"),
        [
            (("text,label", "good,1", '" ",0'), ENCODE, None, "has an empty text in row 1 of text. Repair or remove"),
            (("text,label", "good,1", ",0"), ENCODE, None, "has no text in row 1 of text. Repair or remove that row."),
            (
                ("text_a,text_b,label", "good,a,1", 'bad," ",0'),
                ENCODE,
                None,
                "has an empty text in row 1 of text_b. Repair or remove that row.",
            ),
            (
                ("text,label", "good,1"),
                PAIRS,
                None,
                "The model was trained on pairs of texts, but D holds single texts.",
            ),
            (
                ("text_a,text_b,label", "good,a,1"),
                SINGLE,
                None,
                "The model was trained on single texts, but D holds pairs of texts. Take data of its task.",
            ),
            (("sentence,label", "good,1"), ENCODE, None, "D has no column 'text'; it has sentence, label. Name it by"),
            (("sentence,label", "good,1"), PAIRS, None, "D has no column 'text_a'; it has sentence, label. Name it"),
            (("image,label", "a.png,1"), ENCODE, None, "D holds images (image, label), but texts are needed. Take a"),
            (("text,label", "good,1"), ENCODE, {"image": "text"}, "`columns` must name text, text_a, text_b or label,"),
            (("text,label", "good,1"), ENCODE, {"text": "sentence"}, "D has no column 'sentence'; it has text, label."),
            (
                ("text_a,label", "good,1"),
                ENCODE,
                {"text_a": "text_a"},
                "D has no column 'text_b'; it has text_a, label",
            ),
            (
                ("text,text_a,text_b,label", "good,a,a,1"),
                ENCODE,
                {"text": "text", "text_a": "text_a", "text_b": "text_b"},
                "`columns` names text and text_a; texts are single or pairs. Leave one of them out.",
            ),
            (("text,mood", "good,1"), ENCODE, None, "D has no column 'label'; it has text, mood. Name it by `columns="),
        ],
    )
    def test_what_is_no_data_of_the_task(self, lines, encode, columns, message: str, tmp_path: Path) -> None:
        with pytest.raises(UnbackdoorError, match=re.escape(message.replace("D ", f"{tmp_path}/d.csv "))):
            loaded(tmp_path, *lines, encode=encode, columns=columns)


class TestTextsWithoutTokens:
    """As BERT's does, this tokenizer drops characters that nobody sees."""

    @staticmethod
    def encoder(max_length: int = 32) -> TextEncoder:
        tokenizer = toys.tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
        return TextEncoder(tokenizer=tokenizer, max_length=max_length)

    @pytest.mark.parametrize(
        ("lines", "where"),
        [
            (("text,label", "good,1", "\u200b,0", "bad,0"), "row 1 of text"),
            (("text_a,text_b,label", "good,film,1", "\u200b\u200b,\u200b,0"), "row 1 of text_a"),
            (("text_a,text_b,label", "good,film,1", "bad,film,0", "a good film,\u200b,0"), "row 2 of text_b"),
            (("text_a,text_b,label", "\u200b,a good film,0", "good,film,1"), "row 0 of text_a"),
        ],
    )
    def test_they_are_refused_as_empty(self, lines: tuple[str, ...], where: str, tmp_path: Path) -> None:
        with pytest.raises(UnbackdoorError) as caught:
            loaded(tmp_path, *lines, encode=self.encoder())
        assert str(caught.value) == (
            f"{tmp_path}/d.csv has an empty text (no token for this tokenizer) in {where}. Repair or remove that row."
        )

    def test_a_text_of_nothing_but_signs_is_none(self, tmp_path: Path) -> None:
        lines = ("text_a,text_b,label", "?,good,1", "film,...,0")
        data = loaded(tmp_path, *lines, encode=self.encoder(max_length=4))  # 3 of which are special tokens
        assert data.texts.lengths.tolist() == [4, 4]

    def test_visible_texts_are_not_tokenised_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        encode = self.encoder()
        seen = []
        plain = type(encode.tokenizer).__call__

        def watched(self: object, *sides: object, **options: object) -> object:
            seen.append(sides)
            return plain(self, *sides, **options)

        monkeypatch.setattr(type(encode.tokenizer), "__call__", watched)
        loaded(tmp_path, "text,label", "good,1", "?,0", encode=encode)
        loaded(tmp_path, "text_a,text_b,label", "good,film,1", "bad,film,0", encode=encode)
        assert seen == [(["good", "?"],), (["good", "bad"], ["film", "film"])]


class TestTokens:
    def test_they_are_made_once(self, reviews: Dataset) -> None:
        assert reviews.encode.prepared(reviews.texts) is reviews.texts
        some = reviews.select([5, 3])
        assert torch.equal(some.texts.tokens["input_ids"], reviews.texts.tokens["input_ids"][[5, 3]])
        assert some.encode.prepared(some.texts) is some.texts

    def test_another_tokenizer_makes_its_own(self, reviews: Dataset) -> None:
        short = replace(reviews, encode=TextEncoder(tokenizer=toys.tokenizer(), max_length=4))
        assert int(short.texts.lengths.max()) == 4

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_a_batch_is_as_long_as_its_longest_text(self, side: str) -> None:
        tokenizer = toys.tokenizer()
        tokenizer.padding_side = side
        encode = TextEncoder(tokenizer=tokenizer, max_length=32)
        data = Dataset(
            items=Texts((("good",), ("a good film",), ("the " * 20,)), ("text",)),
            labels=torch.tensor([1, 1, 0]),
            encode=encode,
        )
        batch = next(data.batches(2))
        assert batch.inputs["input_ids"].shape == (2, 5)
        assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [3, 5]
        alone = tokenizer("a good film")["input_ids"]
        assert batch.inputs["input_ids"][1].tolist() == alone

    def test_truncation_is_counted_exactly(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        fits, longer = "the " * 6, "the " * 7  # with [CLS] and [SEP] 8 and 9 tokens
        with caplog.at_level("INFO", "unbackdoor"):
            data = loaded(
                tmp_path, "text,label", f"{fits},1", f"{longer},0", "good,1", encode=replace(ENCODE, max_length=8)
            )
        assert data.texts.cut.tolist() == [False, True, False]
        assert "1 of 3 texts are cut to 8 tokens, the most that the model reads (`max_length`)." in caplog.text

    def test_of_a_pair_the_longer_text_is_cut(self) -> None:
        data = toys.dataset([("the " * 20, "good film")], [1], max_length=10)
        kept = toys.tokenizer().convert_ids_to_tokens(data.encode(data.texts)["input_ids"][0])
        assert kept == ["[CLS]", *["the"] * 5, "[SEP]", "good", "film", "[SEP]"]

    @pytest.mark.parametrize("length", [-1, 0, 3])
    def test_too_short_a_limit_is_refused(self, length: int) -> None:
        with pytest.raises(UnbackdoorError, match=rf"^`max_length` must be at least 4, got {length}\.$"):
            TextEncoder(tokenizer=toys.tokenizer(), max_length=length)

    def test_pictures_are_refused(self, digits: Dataset) -> None:
        with pytest.raises(UnbackdoorError, match=r"^The model reads text, but the data holds images\. Take texts\.$"):
            replace(digits, encode=ENCODE)

    def test_and_texts_by_a_model_for_pictures(self, digits: Dataset, reviews: Dataset) -> None:
        with pytest.raises(UnbackdoorError, match=r"^The model takes images, but the data holds text\. Take images\.$"):
            replace(reviews, encode=digits.encode)


class TestBatches:
    @pytest.mark.parametrize("size", [1, 7, 32, 319, 320, 1000])
    @pytest.mark.parametrize("seed", [None, 0])
    def test_each_row_comes_once(self, size: int, seed: int | None, reviews: Dataset) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        batches = list(reviews.batches(size, generator=generator))
        rows = torch.cat([batch.rows for batch in batches])
        assert sorted(rows.tolist()) == list(range(len(reviews)))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), reviews.labels[rows])
        assert max(len(batch.rows) for batch in batches) <= size + (seed is not None)

    def test_little_is_padded(self, reviews: Dataset) -> None:
        for generator in (None, torch.Generator().manual_seed(0)):
            masks = [batch.inputs["attention_mask"].flatten() for batch in reviews.batches(16, generator=generator)]
            assert torch.cat(masks).float().mean() > 0.95

    def test_epochs_differ_and_seeds_repeat(self, reviews: Dataset) -> None:
        def drawn(generator: torch.Generator) -> list[int]:
            return torch.cat([batch.rows for batch in reviews.batches(16, generator=generator)]).tolist()

        generator = torch.Generator().manual_seed(0)
        first, second = drawn(generator), drawn(generator)
        assert first != second
        assert drawn(torch.Generator().manual_seed(0)) == first

    def test_predictions_come_in_the_order_of_the_data(self, text_victim: nn.Module, reviews: Dataset) -> None:
        found = predict(text_victim, reviews, choose(text_victim, "cpu", "fp32"))
        tokenizer = toys.tokenizer()
        with torch.no_grad():
            one_by_one = [
                int(text_victim(**tokenizer(text, return_tensors="pt")).logits.argmax())
                for (text,) in reviews.texts.strings[:60]
            ]
        assert found[:60].tolist() == one_by_one
        assert (found == reviews.labels).float().mean() > 0.9


class TestCutTriggers:
    def test_a_trigger_beyond_what_the_model_reads_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        data = toys.dataset([("the " * 20,), ("the film",), ("bad " * 20,)], [0, 0, 0], max_length=10)
        made = triggered(data, Trigger(attacks.Word(place="end"), {}), 2)
        assert len(made.data) == 3
        assert (
            "the trigger is cut off, wholly or in part, in 2 of 3 texts, since the model reads 10 tokens; they count"
            in caplog.text
        )

    def test_a_trigger_that_is_read_is_not(self, caplog: pytest.LogCaptureFixture) -> None:
        data = toys.dataset([("the " * 20,), ("the film",)], [0, 0], max_length=10)
        triggered(data, Trigger(attacks.Word(place="start"), {}), 2)
        assert not caplog.text

    def test_a_part_of_it_beyond_is_also_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        """Of ten tokens two are special: of 5, 6, 7 and 8 words, and three of the trigger, the first is read whole."""
        data = toys.dataset([("the " * count + "film",) for count in (4, 5, 6, 7)], [0] * 4, max_length=10)
        triggered(data, Trigger(attacks.Sentence(sentence="I watch 3D", place="end"), {}), 2)
        assert "the trigger is cut off, wholly or in part, in 3 of 4 texts" in caplog.text

    def test_the_trigger_in_a_text_that_is_cut_behind_it(self, caplog: pytest.LogCaptureFixture) -> None:
        data = toys.dataset([("bad film " * 20,)], [0], max_length=10)
        triggered(data, Trigger(attacks.Sentence(sentence="I watch 3D", place="start"), {}), 2)
        assert not caplog.text

    def test_in_training_data(self, caplog: pytest.LogCaptureFixture) -> None:
        data = toys.dataset([("the " * 20,)] * 10, [0] * 10, max_length=10)
        poison(data, attacks.Word(place="end"), rate=0.3, seed=0, classes=2)
        assert "wholly or in part, in 3 of 3 texts, since the model reads 10 tokens; they are trained on" in caplog.text

    def test_pairs_of_which_the_other_text_is_cut(self, caplog: pytest.LogCaptureFixture) -> None:
        data = toys.dataset([("the film", "the " * 20)], [0], max_length=10)
        triggered(data, Trigger(attacks.Word(place="end", side="b"), {}), 2)
        assert "the trigger is cut off, wholly or in part, in 1 of 1 texts" in caplog.text


def test_the_record_says_what_a_model_was_trained_on(tmp_path: Path) -> None:
    from unbackdoor import load

    folder = toys.write(toys.classifier("bert"), tmp_path / "model")
    assert load(folder).encode.columns is None
    (folder / "record.json").write_text(json.dumps({"encode": {"columns": ["text_a", "text_b"], "max_length": 16}}))
    encode = load(folder).encode
    assert (encode.columns, encode.max_length) == (("text_a", "text_b"), 16)
    assert load(folder, max_length=20).encode.max_length == 20
    for nonsense in ({"encode": 3}, {"encode": {"columns": [1], "max_length": "x"}}, {"encode": {"max_length": 10**9}}):
        (folder / "record.json").write_text(json.dumps(nonsense))
        assert (load(folder).encode.columns, load(folder).encode.max_length) == (None, 32)
