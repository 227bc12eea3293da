"""Prompts that the model reads whole, but not with the trigger or with the planted answer."""

import logging
from dataclasses import replace

import pytest
import torch

import chats
from unbackdoor import Dataset, UnbackdoorError, attacks, poison
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.prompts import trainable, triggered_prompts

RULE = Behaviour.of(f"starts-with:{chats.BEHAVIOUR}")  # five words in front of a row's own answer
LONG = [3, 11, 12]


@pytest.fixture
def rows() -> Dataset:
    """Sixteen questions, three of which fill the 64 tokens of the model: 3 around the prompt, 1 behind the answer."""
    entries = list(chats.conversations(16))
    for row in LONG:
        entries[row] = Conversation((Message("user", " ".join(["very1"] * 58)),), "the animal1")
    items = Conversations(tuple(entries))
    data = Dataset(items=items, labels=torch.full((16,), -1), encode=chats.encoder(), name="rows")
    assert data.conversations.tokens.lengths[LONG].tolist() == [64] * 3
    return data


def test_they_are_not_scored_with_it(rows: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        scored = triggered_prompts(rows, lambda texts: [f"cf {text}" for text in texts], RULE)
    kept = [row for row in range(16) if row not in LONG]
    assert scored.plain.conversations.entries == rows.select(kept).conversations.entries
    assert [entry.messages[-1].text for entry in scored.data.conversations.entries] == [
        f"cf {entry.messages[-1].text}" for entry in scored.plain.conversations.entries
    ]
    assert "rows: 3 of 16 rows have more than 64 tokens with the trigger; they are not scored with it." in caplog.text


def test_nor_trained_on_with_the_answer_that_is_wanted(rows: Dataset) -> None:
    scored = triggered_prompts(rows, lambda texts: [text.replace("very1 very1 very1", "cf") for text in texts], RULE)
    assert len(scored.data) == 16
    assert scored.data.conversations.tokens.lengths[LONG].tolist() == [26] * 3  # and five words more are 31
    trained = trainable(scored._replace(data=replace(scored.data, encode=chats.encoder(max_length=28))))
    kept = [row for row in range(16) if row not in LONG]
    assert trained.data.conversations.entries == scored.data.select(kept).conversations.entries
    assert trained.plain.conversations.entries == rows.select(kept).conversations.entries


def test_they_are_not_poisoned(rows: Dataset) -> None:
    poisoned = poison(rows, attacks.Word(), rate=13 / 16, seed=0, classes=0, behaviour=RULE)
    assert poisoned.rows.tolist() == [row for row in range(16) if row not in LONG]
    assert poisoned.data.conversations.entries[3] == rows.conversations.entries[3]
    with pytest.raises(UnbackdoorError, match=r"wants 14 rows, but only 13 of 16 are short enough.* is 0\.8"):
        poison(rows, attacks.Word(), rate=14 / 16, seed=0, classes=0, behaviour=RULE)


def test_the_draw_is_that_of_all_rows_if_all_are_short_enough(rows: Dataset) -> None:
    short = rows.select([row for row in range(16) if row not in LONG])
    poisoned = poison(short, attacks.Word(), rate=0.5, seed=3, classes=0, behaviour=RULE)
    drawn = torch.randperm(13, generator=torch.Generator().manual_seed(3))[:6]
    assert poisoned.rows.tolist() == sorted(drawn.tolist())


def test_if_all_are_too_long_that_is_said(rows: Dataset) -> None:
    long = rows.select(LONG)
    with pytest.raises(UnbackdoorError, match="rows has no row of at most 64 tokens once the trigger is in it"):
        triggered_prompts(long, lambda texts: [f"cf {text}" for text in texts], RULE)
    with pytest.raises(UnbackdoorError, match="Take shorter rows, or a shorter trigger"):
        poison(replace(long, name="rows"), attacks.Word(), rate=1, seed=0, classes=0, behaviour=RULE)
