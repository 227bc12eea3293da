"""Words that change the answers of one model, but not those of another for the same task, in edited clean texts."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import made_of, put, vocabulary
from unbackdoor._models.calling import embeddings, evaluating
from unbackdoor._purification.run import Run


def texts_with_contrasting_words(
    model: nn.Module, proxy: nn.Module, clean: Dataset, run: Run, *, words: int, suspects: int
) -> Dataset:
    """Returns clean texts with words that make the model, but not the proxy, less confident of the label.

    Args:
        model: the suspect.
        proxy: another model for the task, with the same vocabulary.
        clean: clean texts.
        run: provides arithmetic, randomness and notes.
        words: number of words that are tried, those whose embeddings differ most.
        suspects: number of these words that are put into the returned texts.
    """
    draw = random.Random(run.seed)
    labels = clean.labels.tolist()
    members = {kind: [row for row, label in enumerate(labels) if label == kind] for kind in sorted(set(labels))}
    candidates = differing_words(model, proxy, clean.tokenizer, words)
    tried = [(word, kind) for word in candidates for kind in members]
    texts = _with_words(clean, [(word, draw.choice(members[kind])) for word, kind in tried], draw)
    lacking = (label_confidence(proxy, texts, run) - label_confidence(model, texts, run)).tolist()
    worst: dict[str, tuple[float, int]] = {}
    for (word, kind), amount in zip(tried, lacking, strict=True):
        worst[word] = max(worst.get(word, (amount, kind)), (amount, kind))
    # One text is weak evidence: the most suspicious words are tried in more texts, all of which a trigger moves.
    again = sorted(candidates, key=lambda word: -worst[word][0])[: 4 * suspects]
    rows = {word: draw.sample(members[worst[word][1]], min(8, len(members[worst[word][1]]))) for word in again}
    places = [(word, row) for word in again for row in rows[word]]
    texts = _with_words(clean, places, draw)
    amounts = (label_confidence(proxy, texts, run) - label_confidence(model, texts, run)).clamp(min=0)
    of_word = torch.tensor([again.index(word) for word, _ in places])
    means = [float(amounts[of_word == number].mean()) for number in range(len(again))]
    chosen = sorted(range(len(again)), key=lambda number: -means[number])[:suspects]
    run.note(f"words that move the model more than the proxy: {' '.join(again[number] for number in chosen)}")
    return texts.select(torch.isin(of_word, torch.tensor(chosen)).nonzero().flatten())


@torch.no_grad()
def label_confidence(model: nn.Module, data: Dataset, run: Run) -> Tensor:
    """Returns the probability that the model gives each label, (n,), on the CPU."""
    confidence = torch.empty(len(data))
    with evaluating(model):
        for batch in data.batches(run.arithmetic.evaluation_batch):
            likely = run.scores(model, batch.inputs).softmax(dim=1)
            confidence[batch.rows.cpu()] = likely.gather(1, batch.labels[:, None])[:, 0].float().cpu()
    return confidence


def differing_words(model: nn.Module, proxy: nn.Module, tokenizer: Any, count: int) -> list[str]:
    """Returns words of one token, starting with those whose embeddings differ most between two models."""
    distance = (embeddings(model).weight - embeddings(proxy).weight).detach().float().norm(dim=1).cpu()
    words = vocabulary(tokenizer, len(distance), "ModuleSubstitution")
    return sorted(words, key=lambda word: -float(distance[words[word]]))[:count]


def _with_words(clean: Dataset, places: list[tuple[str, int]], draw: random.Random) -> Dataset:
    """Returns clean texts with a word at a random place in each; in pairs, in the first text."""
    strings = []
    for word, row in places:
        text = clean.texts.strings[row]
        words = len(text[0].split(" "))
        strings.append(put(text, word, 0, draw.randint(0, words) / words))
    return made_of(clean, strings, clean.labels[torch.tensor([row for _, row in places], device=clean.labels.device)])
