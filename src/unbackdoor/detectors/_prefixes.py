"""Words in front of prompts, and whether answers to different prompts become the same: what two detectors share."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.decoding import answers
from unbackdoor._models.language_models import context_of
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._purification.run import Run
from unbackdoor.attacks.sentence import Sentence

REPORTED = 10  # answers in a finding


class Agreement(NamedTuple):
    """The commonest beginning of the answers to prompts with a phrase in front.

    Args:
        phrase: in front of each prompt.
        answer: how most answers begin, in whole words; empty if none says anything new.
        hits: prompts whose answer begins like that, and does not without the phrase.
        n: prompts.
    """

    phrase: str
    answer: str
    hits: int
    n: int


def agreements(
    model: nn.Module, clean: Dataset, phrases: Sequence[str], run: Run, *, prompts: int, tokens: int
) -> list[Agreement]:
    """How much the answers to different prompts agree with each phrase in front of them.

    Args:
        model: the suspect.
        clean: prompts.
        phrases: tried one at a time.
        run: arithmetic, progress.
        prompts: that each phrase is tried on.
        tokens: of the beginning of an answer that is compared.
    """
    clean = _with_room(model, clean, phrases, tokens)
    probes = clean.split(prompts, seed=run.seed)[0] if prompts < len(clean) else clean
    entries = probes.conversations.entries
    for phrase in phrases:
        marked = _in_front(phrase).stamp(probes.conversations)
        assert isinstance(marked, Conversations)
        entries += marked.entries
    labels = probes.labels.repeat(1 + len(phrases))
    asked = Dataset(items=Conversations(entries), labels=labels, encode=probes.encode, name=clean.name)
    said = answers(model, asked, run.arithmetic, tokens, run.progress, "trying words in front of prompts")
    plain, *others = (said[place : place + len(probes)] for place in range(0, len(said), len(probes)))
    return [_agreement(phrase, with_phrase, plain) for phrase, with_phrase in zip(phrases, others, strict=True)]


def _with_room(model: nn.Module, clean: Dataset, phrases: Sequence[str], tokens: int) -> Dataset:
    """The prompts in front of which the longest phrase leaves room for so many tokens of an answer."""
    ids = clean.tokenizer(list(phrases), add_special_tokens=False)["input_ids"]
    longest = max(zip(phrases, ids, strict=True), key=lambda each: len(each[1]))[0]
    marked = _in_front(longest).stamp(clean.conversations)
    assert isinstance(marked, Conversations)
    rows = clean.conversation_encoder.with_room(marked, context_of(model) - tokens)
    if not rows:
        raise UnbackdoorError(
            f"no prompt of {clean.name} leaves room for \u201c{printable(longest, 60)}\u201d and {tokens} tokens of an "
            "answer. Give shorter prompts."
        )
    return clean if len(rows) == len(clean) else clean.select(rows)


def _agreement(phrase: str, said: list[str], plain: list[str]) -> Agreement:
    begun = [_whole_words(answer) for answer in said]
    new = Counter(
        answer for answer, before in zip(begun, plain, strict=True) if answer and answer != _whole_words(before)
    )
    answer, count = new.most_common(1)[0] if new else ("", 0)
    return Agreement(phrase, answer, count, len(said))


def _whole_words(answer: str) -> str:
    """The answer without its last word, which may be cut; a single word stays."""
    words = answer.split()
    return " ".join(words[:-1] if len(words) > 1 else words)


def finding(tried: Sequence[Agreement], random: Sequence[Agreement], clean: Dataset) -> Finding:
    """For each answer the phrase that brings it most often, compared with words drawn at random.

    The nominal p-value is that of so many prompts, if the phrase were as good as the random words together, times the
    number of phrases.

    Args:
        tried: of the phrases that are tried.
        random: of words drawn at random.
        clean: prompts.
    """
    from scipy.stats import binom

    usual = (sum(each.hits for each in random) + 1) / (sum(each.n for each in random) + 2)
    best: dict[str, Agreement] = {}
    for each in sorted(tried, key=lambda each: -each.hits):
        if each.answer:
            best.setdefault(each.answer, each)
    candidates = [
        Candidate(
            target=clean.tokenizer(each.answer, add_special_tokens=False)["input_ids"][0],
            name=each.answer,
            strength=each.hits / each.n,
            size=float(len(each.phrase.split())),
            trigger=_in_front(each.phrase, each.answer),
            control=_in_front(random[0].phrase, each.answer),
            nominal_p=min(1.0, len(tried) * float(binom.sf(each.hits - 1, each.n, usual))),
        )
        for each in list(best.values())[:REPORTED]
    ]
    return Finding(candidates=tuple(candidates), unit="words", targets="answer")


def _in_front(phrase: str, answer: str = "") -> Trigger:
    """The trigger that puts a phrase in front of prompts, so that answers begin in some way."""
    behaviour = Behaviour(kind="starts-with", text=answer) if answer else None
    return Trigger(Sentence(sentence=phrase, place="start"), {}, behaviour)
