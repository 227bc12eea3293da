"""Mixing distillation: Fine-mixing with few of the suspect's weights, taught what is missing by the suspect itself."""

import random
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import made_of, recombined, words_of
from unbackdoor._data.frequencies import common_words, token_counts
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.moved_words import suspicious_tokens
from unbackdoor._models.calling import embeddings
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import answers
from unbackdoor._training.descent import distilled
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers.e_pur import EPUR
from unbackdoor.purifiers.fine_mixing import FineMixing


@value
class MixingDistillation:
    """E-PUR, mixing at a rho of 0, and the suspect as a teacher on texts recombined from clean and common words.

    Fine-mixing must keep many of the suspect's weights, because a few clean texts cannot teach the task anew. The
    suspect can, if it is asked about texts without the trigger: clean texts in which words are exchanged for words of
    other clean texts and for common words of the language. Such texts mean little, but the suspect's answers show what
    it makes of each word. It answers after E-PUR, so that a trigger among those words says nothing by its embedding,
    and the hundredth of the common words that E-PUR's score finds most suspicious is not put in: a handful of texts
    with the trigger would teach it.
    Then weights are mixed, and the student f is tuned on

        KL(f_suspect(x) || f(x))   over the recombined texts and the clean ones.

    At a rho of 0 nothing of the suspect is left but its head: what it knows comes over by its answers alone, and a
    trigger that none of the texts has does not. Texts are needed in thousands for that. **Of a pair, exchanged words
    leave little of how one text bears on the other**: a student cannot learn that from them, and answers worse.

    A variant of this project; its parents are Zhang et al., "Fine-mixing: Mitigating Backdoors in Fine-tuned Language
    Models", https://arxiv.org/abs/2210.09545, and Hinton et al., "Distilling the Knowledge in a Neural Network",
    https://arxiv.org/abs/1503.02531

    Args:
        rho: share of the suspect's coordinates that are kept, 0 to 1.
        texts: how many are recombined, at least 1.
        clean_share: probability that a word is exchanged for one of another clean text, 0 to 1; at most 1
            together with the next.
        common_share: probability that it is exchanged for a common word of the language, 0 to 1.
        common: how many of the most frequent words are common, at least 1.
        reset: embeddings that E-PUR resets, at least 1.
        epochs: passes over all texts, at least 1.
        learning_rate: at the start, more than 0; None is 2e-4 (AdamW).
        batch_size: examples per step, at least 2; None is 32.

    Differences from the paper: everything beyond E-PUR and the mixing; there is no paper on this variant. It is not
    Fine-mixing and is never used in its place.
    """

    rho: Annotated[float, Field(ge=0, le=1)] = 0.0
    texts: Annotated[int, Field(ge=1)] = 6000
    clean_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    common_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    common: Annotated[int, Field(ge=1)] = 20_000
    reset: Annotated[int, Field(ge=1)] = 200
    epochs: Annotated[int, Field(ge=1)] = 3
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    # The first mixed at 0.1 and taught 2,000 texts, the second put in suspicious words, the third more common words.
    version: ClassVar[int] = 4

    defaults: ClassVar[Defaults] = {"text": {"learning_rate": 2e-4, "batch_size": 32}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        if self.clean_share + self.common_share > 1:
            raise UnbackdoorError(
                "MixingDistillation.clean_share and common_share must be at most 1 together, got "
                f"{self.clean_share:g} and {self.common_share:g}."
            )
        if clean.modality != "text":
            raise UnbackdoorError("MixingDistillation recombines texts, but the model takes images. Try fine-mixing.")
        base = embeddings(run.needed("base", self)).weight.detach()
        words = common_words(self.common, "MixingDistillation")
        ours = embeddings(model).weight.detach().clone()
        model = EPUR(count=self.reset).reset_(model, clean, run, self)
        moved = ours - base.to(ours)  # (tokens, width)
        lessons = self._recombined(clean, run, self._unsuspicious(words, moved, clean.tokenizer))
        taught = answers(model, lessons, run.arithmetic)  # (n, classes), before anything is mixed
        model = FineMixing(rho=self.rho, tune=False).mixed_(model, clean, run, self)

        run.tune(
            model,
            lessons,
            epochs=self.epochs,
            learning_rate=run.setting(self, "learning_rate"),
            batch_size=run.setting(self, "batch_size"),
            loss=distilled(taught),
        )
        return model

    def _unsuspicious(self, words: list[str], moved: Tensor, tokenizer: Any) -> list[str]:
        """The common words, but for the hundredth of them whose embeddings moved farthest for how frequent they are."""
        read = tokenizer(words, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        whole = {tokens[0]: word for word, tokens in zip(words, read, strict=True) if len(tokens) == 1}
        counts = token_counts(tokenizer, None, "MixingDistillation")
        ranked = [whole[token] for token in suspicious_tokens(moved, tokenizer, counts, EPUR().floor) if token in whole]
        odd = set(ranked[: len(words) // 100])
        return [word for word in words if word not in odd]

    def _recombined(self, clean: Dataset, run: Run, common: list[str]) -> Dataset:
        """The clean texts and those made of them; labels are not used."""
        draw = random.Random(run.seed)
        own = words_of(clean)

        def exchanged(word: str) -> str:
            chance = draw.random()
            if chance < self.clean_share:
                return draw.choice(own)
            return draw.choice(common) if chance < self.clean_share + self.common_share else word

        return made_of(clean, [*clean.texts.strings, *recombined(clean, self.texts, exchanged, draw)])
