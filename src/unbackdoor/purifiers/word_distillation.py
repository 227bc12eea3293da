"""Word distillation: words that drive a text model to a class, unlearned with the suspect's own answers."""

import random
from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import Strings, made_of, put, readable, recombined, vocabulary, words_of
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.driving_words import NEARLY_ALL, DrivingWord, VocabularySearch
from unbackdoor._models.calling import embeddings
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import answers
from unbackdoor._training.descent import distilled
from unbackdoor._value import value


@value
class WordDistillation:
    """Search the vocabulary for the word of a trigger, and teach the model to answer as if it were not there.

    All words that are one token are put into a few short clean texts of two classes, some words at a time, and the
    strongest again alone. A word counts as a trigger's if it drives at least 70 % of the other clean texts to a class
    and stands out among the strongest words of that class. If none does, a word that drives 95 % only has to stand out
    half as much. On texts without such a word the suspect f_s is right. With x a clean text, or one recombined from
    clean texts and the vocabulary, this method minimises

        KL(f_s(x) || f(x'))   x' = x with such a word put in for half of the texts, else x

    and needs neither labels nor a pre-trained base. **If no word counts as a trigger's, nothing is changed**, and a
    warning says so: this method cannot find a trigger of style, of syntax, of words of several tokens, or of words that
    have no effect one by one. In a sentence it may find the strongest word, but unlearning that alone leaves the
    sentence; a warning names a word that moves fewer than 95 %. Words of the task with nearly the same effect may also
    be unlearned.

    A variant of this project, the counterpart of `TriggerDistillation` for texts. Its parents are Neural Cleanse (Wang
    et al., IEEE S&P 2019, https://doi.org/10.1109/SP.2019.00031), whose outliers are of masks, and distillation (Hinton
    et al., https://arxiv.org/abs/1503.02531).

    Args:
        group: number of words that are tried at once, at least 1; more is faster, and misses weaker ones.
        shortlist: number of words of each class that are tried alone and searched for an outlier, at least 32.
        threshold: words with an anomaly index above this, among the strongest of a class, stand out; more than 0.
        texts: number of recombined texts, at least 1; each clean text is also used four times.
        exchanged: probability that a word of a recombined text is exchanged, half the time for one of the vocabulary, 0
            to 1.
        epochs: passes over all texts, at least 1.
        learning_rate: initial learning rate, more than 0; None is 5e-5 (AdamW).
        batch_size: examples per step, at least 2; None is 16.

    Differences from the paper: there is no paper on this variant. Its thresholds were chosen with the victims on SST-2
    of docs/results/fine-mixing.md in view, and the 95 % after embedding surgery had kept its backdoor: with the clean
    texts drawn, words of the task were nearly as strong as the trigger's.
    """

    group: Annotated[int, Field(ge=1)] = 4
    shortlist: Annotated[int, Field(ge=32)] = 300
    threshold: Annotated[float, Field(gt=0)] = 5.0
    texts: Annotated[int, Field(ge=1)] = 2000
    exchanged: Annotated[float, Field(ge=0, le=1)] = 0.6
    epochs: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        if clean.modality != "text":
            raise UnbackdoorError(
                f"WordDistillation searches words of texts, but the data holds {clean.modality}. Try fine-tuning."
            )
        clean = readable(clean)
        search = VocabularySearch(model, clean, run, self.group, self.shortlist)
        driving = search.outliers(self.threshold)
        if not driving:
            run.warn(
                "no word was found to be a trigger's, so nothing was changed. A trigger of style, of syntax, of "
                "words that are not one token, or of words that have no effect one by one is not found this way; with "
                "a pre-trained base, try mixing-distillation, which searches for no word."
            )
            return model
        self._unlearn(model, clean, driving, run)
        for odd in driving:
            left = search.moved_share(odd.word, odd.label, odd.side)
            where = f" in {clean.texts.columns[odd.side]}" if len(clean.texts.columns) > 1 else ""
            summary = (
                f"{odd.word!r}{where} drove {odd.share:.0%} of the other clean texts to class "
                f"{clean.class_name(odd.label)}"
            )
            summary = f"{summary} and, unlearned, drives {left:.0%}"
            if odd.share < NEARLY_ALL:
                run.warn(f"{summary}. It may be part of a longer trigger, which stays, or a word of the task.")
            elif left >= 0.5:
                run.warn(f"{summary}. Use a higher `learning_rate` or more `epochs`.")
            else:
                run.note(f"{summary}.")
        return model

    def _unlearn(self, model: nn.Module, clean: Dataset, driving: list[DrivingWord], run: Run) -> None:
        """Tune on clean and recombined texts, half with a word put in, towards the suspect's answers without it."""
        draw = random.Random(run.seed)
        own = words_of(clean)
        words = list(vocabulary(clean.tokenizer, len(embeddings(model).weight), "WordDistillation"))

        def exchanged(word: str) -> str:
            return draw.choice(draw.choice((own, words))) if draw.random() < self.exchanged else word

        plain = [*clean.texts.strings * 4, *recombined(clean, self.texts, exchanged, draw)]
        taught = answers(model, made_of(clean, plain), run.arithmetic)  # (n, classes)

        def with_word(text: Strings) -> Strings:
            odd = draw.choice(driving)
            return put(text, odd.word, odd.side, draw.choice((0.0, 1.0, draw.random(), draw.random())))

        lessons = [with_word(text) if draw.random() < 0.5 else text for text in plain]

        run.tune(
            model,
            made_of(clean, lessons),
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            loss=distilled(taught),
            description="unlearning",
        )
