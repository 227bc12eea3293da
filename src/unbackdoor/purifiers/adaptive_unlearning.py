"""Adaptive unlearning: the smallest triggers are unlearned while they follow the model."""

import copy
from itertools import chain
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import listed
from unbackdoor._inversion.pursuit import Follower, followers
from unbackdoor._inversion.triggers import encoded, in_pixels, refuse_texts
from unbackdoor._inversion.unlearning import triggered_rows
from unbackdoor._models.calling import probe
from unbackdoor._models.head import Head
from unbackdoor._models.hooks import without_dropout
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import difference
from unbackdoor._tasks.classification import hits
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._calibrated import calibrated_temperature, softened
from unbackdoor.purifiers._equal_steps import equal_steps
from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST

# A network without normalisation cannot bear the steps of others: it forgets even what it is tuned on.
FORGOTTEN = 0.08  # of these examples
SLOWER = 4
ATTEMPTS = 3


@value
class AdaptiveUnlearning:
    """Search the smallest triggers of each kind, and unlearn them while each follows the model as it changes.

    A trigger that a search finds is not the attacker's, only near it: a model that has unlearned the one still follows
    the other. So the trigger is not left as it was found. For patches, patterns over the whole picture and patterns of
    low frequency, this method searches the smallest trigger to each class. Those of a kind that are at most twice as
    large as the smallest of it are unlearned, with two exceptions. A kind is left out if more than a third of the
    classes have such a trigger, as it is so in clean models. Of the classes that remain, only those to which the most
    kinds lead are taken. If no trigger is left to unlearn, the features are shifted, by scale-invariant FST at its own
    settings. Each step draws a trigger, T to a class t, moves it against the model f by a step of Adam down

        CE(f(T(x)), t)   subject to   size(T) <= 3 times the size that was found

    and then tunes the model by a step down

        taught * KL(f_suspect(x) || f(x')) + (1 - taught) * CE(f(x'), y),   x' = T(x) for a share of the batch, else x

    over the clean examples (x, y), in steps of equal angles (see `ScaleInvariantFST`): what the suspect answers to a
    picture without the trigger is right, and teaches more than a label. All scores are divided by the temperature at
    which the suspect is as sure of the clean examples as it is right, if that is above 1: the surer its answers, the
    further a step takes the model, and the more it forgets (calibration: Guo et al., ICML 2017). If the model forgets
    more than 8 points of these examples, the suspect is tuned again at a quarter of the rate, and then at a sixteenth.

    A variant of this project. Its parents are Neural Cleanse (Wang et al., IEEE S&P 2019,
    https://doi.org/10.1109/SP.2019.00031) and I-BAU (Zeng et al., ICLR 2022, https://arxiv.org/abs/2110.03735), which
    unlearns one perturbation that is searched again in each round, for no class in particular.

    Cannot remove, where it finds another trigger: those that differ between pictures, those of a few source classes,
    and others that no small trigger of the three kinds comes near.

    Args:
        steps: steps of the search for each kind of trigger, at least 1.
        taught: weight of the suspect's answers against the labels, 0 to 1.
        share: share of each batch that carries the trigger, more than 0 and at most 1.
        epochs: passes over the clean examples, at least 1, with three more forward passes and a backward pass each.
        learning_rate: initial learning rate, more than 0; None is 0.02 (SGD, in steps of equal angles), or less.
        batch_size: examples per step, at least 2; None is 32.

    Differences from the paper: there is no paper on this variant. Pixels only.
    """

    # The first version unlearned triggers of all classes if none stood out: 9 points on a clean model of others. The
    # second also unlearned those of a class that one kind led to, where several led to another one. The third took all
    # answers as they are, and models with sure ones forgot.
    version: ClassVar[int] = 4
    needs_head: ClassVar[bool] = True  # the search takes long; steps of equal angles, and the shift, need the head
    defaults: ClassVar[Defaults] = {"images": {"learning_rate": 0.02, "batch_size": 32}}

    steps: Annotated[int, Field(ge=1)] = 100
    taught: Annotated[float, Field(ge=0, le=1)] = 0.9
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    epochs: Annotated[int, Field(ge=1)] = 40
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_texts(self, clean)
        kinds = followers(model, clean, run, steps=self.steps)
        if not kinds:
            run.note(
                "AdaptiveUnlearning: no trigger to few classes stands out, so there is none to unlearn; the features "
                "are shifted by scale-invariant-fst."
            )
            with run.of_another("scale-invariant-fst"):
                return ScaleInvariantFST()(model, clean, run)
        found = [f"a {each.kind} to {clean.class_name(each.target)}" for kind in kinds for each in kind]
        run.note(f"triggers that are unlearned: {listed(found)}.")
        suspect = copy.deepcopy(model).eval().requires_grad_(False)

        before = hits(suspect, clean, run.arithmetic)
        rate: float = run.setting(self, "learning_rate")
        for attempt in range(1 if self.learning_rate is not None else ATTEMPTS):
            model.load_state_dict(suspect.state_dict())
            self._unlearn(model, suspect, kinds, clean, run, rate / SLOWER**attempt)
            lost = difference(before, hits(model, clean, run.arithmetic)).lost
            if lost <= FORGOTTEN:
                break
            run.note(
                f"at a learning rate of {rate / SLOWER**attempt:g} the model forgot {100 * lost:.1f} points of the "
                "clean examples that it was tuned on."
            )
        return model

    def _unlearn(
        self,
        model: nn.Module,
        suspect: nn.Module,
        kinds: list[list[Follower]],
        clean: Dataset,
        run: Run,
        learning_rate: float,
    ) -> None:
        """Tune the model at a rate, while each trigger follows it from where it was found."""
        for each in chain.from_iterable(kinds):
            each.restart_()

        def fill(batch: Batch) -> None:
            kind, place = torch.rand(2, generator=run.generator).tolist()
            drawn = kinds[int(kind * len(kinds))]
            self._fill(model, suspect, batch, drawn[int(place * len(drawn))], clean, run)

        head, theirs = (Head(run.head_name, run.head(each)) for each in (model, suspect))
        temperature = calibrated_temperature(suspect, clean, run.arithmetic)
        with (
            softened(suspect, theirs, temperature),
            softened(model, head, temperature),
            equal_steps(model, head, probe(model, clean)),
            without_dropout(model),
        ):
            run.tune(
                model,
                in_pixels(clean),
                epochs=self.epochs,
                learning_rate=learning_rate,
                batch_size=run.setting(self, "batch_size"),
                gradients=fill,
                description="unlearning",
            )

    def _fill(
        self, model: nn.Module, suspect: nn.Module, batch: Batch, trigger: Follower, clean: Dataset, run: Run
    ) -> None:
        """Let the trigger follow the model, and fill the gradients of a step that unlearns it."""
        pixels = batch.pixels
        trigger.step_(model, pixels, clean, run)
        answers = run.scores(suspect, encoded(clean, pixels, run)).softmax(dim=1)  # (batch, classes)
        rows = triggered_rows(len(pixels), self.share).to(pixels.device)
        shown = pixels.index_copy(0, rows, trigger.shown(pixels[rows]))
        scores = run.scores(model, encoded(clean, shown, run))
        taught = F.kl_div(scores.log_softmax(dim=1), answers, reduction="batchmean")
        (self.taught * taught + (1 - self.taught) * F.cross_entropy(scores, batch.labels)).backward()
