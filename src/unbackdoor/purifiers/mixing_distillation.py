"""Mixing distillation: Fine-mixing that keeps few of the suspect's weights; the suspect teaches the rest."""

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
    """E-PUR, then mixing at a rho of 0, then tuning with the suspect as the teacher on recombined texts.

    Fine-mixing must keep many of the suspect's weights, because a few clean texts cannot teach the task from the start.
    The suspect can, with its answers to texts without the trigger: clean texts in which words are exchanged for words
    of other clean texts and for common words of the language. Such texts mean little, but the suspect's answers show
    the effect of each word. It answers after E-PUR, so that a trigger among those words has no effect by its embedding.
    The hundredth of the common words with the highest scores of E-PUR is left out, because a few texts with the
    trigger would teach it. Then weights are mixed, and the student f is tuned on

        KL(f_suspect(x) || f(x))   over the recombined texts and the clean ones.

    At a rho of 0 only the head of the suspect is left: its knowledge reaches the student through its answers alone, and
    a trigger that is in none of the texts does not. This needs thousands of texts. **In pairs of texts, exchanged words
    leave little of the relation between the two**: a student cannot learn it from them, and its answers get worse.

    A variant of this project; its parents are Zhang et al., "Fine-mixing: Mitigating Backdoors in Fine-tuned Language
    Models", https://arxiv.org/abs/2210.09545, and Hinton et al., "Distilling the Knowledge in a Neural Network",
    https://arxiv.org/abs/1503.02531

    Args:
        rho: share of the suspect's coordinates that are kept, 0 to 1.
        texts: number of recombined texts, at least 1.
        clean_share: probability that a word is exchanged for one of another clean text, 0 to 1; at most 1 together with
            common_share.
        common_share: probability that it is exchanged for a common word of the language, 0 to 1.
        common: number of the most frequent words that count as common, at least 1.
        reset: number of embeddings that E-PUR resets, at least 1.
        epochs: passes over all texts, at least 1.
        learning_rate: initial learning rate, more than 0; None is 2e-4 (AdamW).
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

    # Version 1 mixed at 0.1 and used 2,000 texts, version 2 put in suspicious words, version 3 more common words.
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
            raise UnbackdoorError(
                f"MixingDistillation recombines texts, but the data holds {clean.modality}. Try fine-mixing."
            )
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
        """Returns the common words without the hundredth whose embeddings moved farthest for how frequent they are."""
        read = tokenizer(words, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        whole = {tokens[0]: word for word, tokens in zip(words, read, strict=True) if len(tokens) == 1}
        counts = token_counts(tokenizer, None, "MixingDistillation")
        ranked = [whole[token] for token in suspicious_tokens(moved, tokenizer, counts, EPUR().floor) if token in whole]
        odd = set(ranked[: len(words) // 100])
        return [word for word in words if word not in odd]

    def _recombined(self, clean: Dataset, run: Run, common: list[str]) -> Dataset:
        """Returns the clean texts and those recombined from them; labels are not used."""
        draw = random.Random(run.seed)
        own = words_of(clean)

        def exchanged(word: str) -> str:
            chance = draw.random()
            if chance < self.clean_share:
                return draw.choice(own)
            return draw.choice(common) if chance < self.clean_share + self.common_share else word

        return made_of(clean, [*clean.texts.strings, *recombined(clean, self.texts, exchanged, draw)])
