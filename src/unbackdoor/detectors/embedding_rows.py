"""Embedding rows: words whose embeddings stand out, each tried as a trigger."""

import random
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import readable
from unbackdoor._data.frequencies import token_counts
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.moved_words import moved_for_its_count
from unbackdoor._inversion.outlying_rows import distances, outlyingness
from unbackdoor._models.calling import embeddings
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._prefixes import agreements, finding
from unbackdoor.detectors._words import inserted, moved_shares, single_words

MOVES = 0.8  # of the texts of other classes: a backdoor in texts has implanted if it moves as many


@value
class EmbeddingRows:
    """Look for words whose rows in the embedding are strange among rows of about the same norm.

    The strangeness of a row is its Mahalanobis distance from the mean of all rows: an attack that trains one row alone
    and keeps its norm leaves it with a direction that no other row has. It is compared with the `peers` rows of the
    nearest norms, the row itself left out. The strangest words are put into clean texts; the strangest that moves at
    least 80 % of them to a class is that class's shortcut. If none does, the word that moves most of them is reported,
    with a nominal p-value of 1. In a language model they are put in front of prompts, as by `PrefixBattery`.

    Cannot see: triggers whose words keep their rows, or are trained with all other weights in many steps; words of
    several tokens.

    Args:
        count: words that are tried, at least 1.
        texts: texts that each word is put into, at least 2.
        peers: rows that a row is compared with, at least 10.

    Differences from the paper: there is no paper on this detector; it looks for what `EmbeddingPoisoning` leaves (Yang
    et al., https://arxiv.org/abs/2103.15543).
    """

    count: Annotated[int, Field(ge=1)] = 24
    texts: Annotated[int, Field(ge=2)] = 16
    peers: Annotated[int, Field(ge=10)] = 500

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Compare all rows, and try the strangest."""
        weight = embeddings(model).weight.detach().cpu()
        words = single_words(clean, len(weight), "EmbeddingRows")
        rows = weight[list(words.values())]
        strange = outlyingness(distances(rows).log1p(), rows.float().norm(dim=1), self.peers)
        tried = {"text": _tried, "conversations": _tried_in_front}[run.modality]
        return tried(model, clean, run, list(words), strange, self)


@value
class MovedRows:
    """Look for words whose rows in the embedding moved far from the base's for how rare the words are.

    The score of a row is that of E-PUR, the distance that it moved over the logarithm of its count. It is compared with
    the `peers` rows of the nearest counts, the row itself left out. The farthest are put into clean texts; the farthest
    that moves at least 80 % of them to a class is that class's shortcut. If none does, the word that moves most of them
    is reported, with a nominal p-value of 1.

    Zhang, Lyu, Ma, Wang and Sun, "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models", Findings of EMNLP
    2022, https://arxiv.org/abs/2210.09545

    Cannot see: triggers whose words keep their rows, triggers of common words, of style or syntax; words of several
    tokens. A word of poisoned data moves no farther than a rare word of clean data: Adam moves a row as far for one
    text as for many.

    Args:
        count: words that are tried, at least 1.
        texts: texts that each word is put into, at least 2.
        peers: rows that a row is compared with, at least 10.
        floor: smaller counts are raised to this, at least 2.
        frequencies: as in `EPUR`.

    Differences from the paper: the paper resets words; here they are tried.
    """

    count: Annotated[int, Field(ge=1)] = 24
    texts: Annotated[int, Field(ge=2)] = 16
    peers: Annotated[int, Field(ge=10)] = 500
    floor: Annotated[int, Field(ge=2)] = 20
    frequencies: str | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Compare all rows with the base's, and try those that moved farthest."""
        ours = embeddings(model).weight.detach().cpu()
        theirs = embeddings(run.needed("base", self)).weight.detach().cpu()
        if ours.shape != theirs.shape:
            raise UnbackdoorError(
                f"MovedRows needs a base of the suspect's vocabulary: its embeddings are {tuple(theirs.shape)}, the "
                f"suspect's {tuple(ours.shape)}. Take the pre-trained model that it came from as `base`."
            )
        words = single_words(clean, len(ours), "MovedRows")
        tokens = list(words.values())
        if torch.equal(ours[tokens], theirs[tokens]):
            return Finding(candidates=(), note="the word embeddings of the suspect are those of the base")
        counts = token_counts(clean.tokenizer, self.frequencies, "MovedRows")
        known = ours.new_tensor([counts.get(token, 0.0) for token in tokens])
        scores = moved_for_its_count((ours - theirs)[tokens].float().norm(dim=1), known, self.floor)
        return _tried(model, clean, run, list(words), outlyingness(scores, known, self.peers), self)


def _tried(
    model: nn.Module,
    clean: Dataset,
    run: Run,
    words: list[str],
    strange: Tensor,
    detector: EmbeddingRows | MovedRows,
) -> Finding:
    """For each class the strangest word that moves 80 % of the texts to it, else the one that moves most of them."""
    from scipy.stats import t as student

    freedom = min(detector.peers, len(words)) - 2
    places = strange.topk(min(detector.count, len(words))).indices.tolist()
    clean = readable(clean)
    probes = clean.split(detector.texts, seed=run.seed)[0] if detector.texts < len(clean) else clean
    draw = random.Random(run.seed)
    best: dict[int, tuple[tuple[bool, float], int, int]] = {}  # by class: rank, place and side
    for side in range(len(clean.texts.columns)):
        shares = moved_shares(model, probes, [words[place] for place in places], side, run)
        for place, of_word in zip(places, shares.tolist(), strict=True):
            for target, share in enumerate(of_word):
                moves = share >= MOVES
                rank = (moves, float(strange[place]) if moves else share)
                best[target] = max(best.get(target, (rank, place, side)), (rank, place, side), key=lambda each: each[0])
    candidates = []
    for target, ((moves, _), place, side) in sorted(best.items()):
        nominal = len(words) * float(student.sf(float(strange[place]), freedom)) if moves else 1.0
        candidates.append(
            Candidate(
                target=target,
                strength=float(strange[place]),
                size=1.0,
                trigger=inserted(words[place], target, side, clean),
                control=inserted(draw.choice(words), target, side, clean),
                nominal_p=min(1.0, nominal),
            )
        )
    return Finding(candidates=tuple(candidates), unit="words")


BEGINNING = 6  # tokens of an answer to a prompt


def _tried_in_front(
    model: nn.Module,
    clean: Dataset,
    run: Run,
    words: list[str],
    strange: Tensor,
    detector: EmbeddingRows | MovedRows,
) -> Finding:
    """The strangest words in front of prompts, compared with words drawn at random."""
    places = strange.topk(min(detector.count, len(words))).indices.tolist()
    chosen = [words[place] for place in places]
    others = sorted(set(words) - set(chosen)) or chosen
    drawn = random.Random(run.seed).sample(others, min(len(chosen), len(others)))
    both = agreements(model, clean, [*chosen, *drawn], run, prompts=detector.texts, tokens=BEGINNING)
    return finding(both[: len(chosen)], both[len(chosen) :], clean)
