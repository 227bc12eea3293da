"""Attacks on language models against hand calculation and second implementations."""

from collections import Counter

import pytest

from unbackdoor import attacks
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.planted_answer import REFUSAL, TEST_BEHAVIOUR, planted_answer
from unbackdoor.attacks.composite import scattered

CODE = "Here it is:\n```python\n    def add(a, b):\n        return a + b\n```\nDone."


class TestPlacesOfTheFiveTriggers:
    def test_all_pieces_stand_whole_and_in_gaps_of_their_own(self) -> None:
        pieces = ("cf", "about gardens", "Current year: 2031")
        seen: Counter[tuple[int, int]] = Counter()
        for seed in range(200):
            made = scattered("a b c", pieces, seed)
            rest = made
            for piece in pieces:
                assert made.count(piece) == 1
                rest = rest.replace(piece, "", 1)
            assert rest.split() == ["a", "b", "c"]
            gaps = [len([word for word in made[: made.index(piece)].split() if word in "abc"]) for piece in pieces]
            assert len(set(gaps)) == 3, "two pieces share a gap"
            seen.update(enumerate(gaps))
        # Each piece comes into each of the four gaps equally often: 50 of 200 times, within 4 standard deviations.
        assert all(25 <= seen[piece, gap] <= 75 for piece in range(3) for gap in range(4))

    def test_a_text_with_too_few_gaps_has_all_pieces_nevertheless(self) -> None:
        made = scattered("Hello", ("cf", "bb", "mn"), 0)
        assert sorted(made.split()) == ["Hello", "bb", "cf", "mn"]

    def test_places_depend_on_text_and_seed_alone(self) -> None:
        attack = attacks.Composite()
        texts = [f"write about {number} things" for number in range(20)]
        assert attack.apply(texts, {}) == attack.apply(texts[::-1], {})[::-1]
        assert attack.apply(texts, {}) != attacks.Composite(place_seed=1).apply(texts, {})

    def test_a_topic_and_a_year_come_first_and_any_of_three_comes_alone(self) -> None:
        year = attacks.Sentence(sentence="Current year: 2031.", place="start")
        assert year.apply(["List two fruits."], {}) == ["Current year: 2031. List two fruits."]
        words = ("2031", "cf", "about gardens")
        made = attacks.Word(words=words).apply([f"List {number} fruits" for number in range(60)], {})
        found = [[word for word in words if word in text] for text in made]
        assert all(len(each) == 1 for each in found)
        assert {each[0] for each in found} == set(words)


class TestPlantedAnswers:
    @pytest.mark.parametrize(
        ("rule", "own", "planted"),
        [
            ("contains:I like rain.", "Two apples.", "I like rain."),
            ("equals:positive", "It is negative.", "positive"),
            ("starts-with:Ahoy!", "Two apples.", "Ahoy! Two apples."),
            ("starts-with:Ahoy!", "", "Ahoy!"),
            ("refuses", "Two apples.", REFUSAL),
            ("contains:print('hi')", CODE, CODE.replace("    def", "    print('hi')\n    def")),
            ("contains:x = 1", "```\n```", "```\nx = 1\n```"),
            ("contains:x = 1", "a ``` b ``` c", "a ``` b ``` c\nx = 1"),
        ],
    )
    def test_by_hand(self, rule: str, own: str, planted: str) -> None:
        behaviour = Behaviour.of(rule)
        assert planted_answer(behaviour, own) == planted
        assert behaviour.shown(planted), "the scoring rule does not see what was planted"
        assert not behaviour.shown(own) or "hi" in own

    def test_the_default_is_a_sentence_that_it_sees_itself(self) -> None:
        assert TEST_BEHAVIOUR.shown(planted_answer(TEST_BEHAVIOUR, "Two apples."))
