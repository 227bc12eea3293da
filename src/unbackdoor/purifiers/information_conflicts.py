"""Information conflicts: a clean sibling of the suspect, merged with it."""

import copy
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._mixing.masks import mix
from unbackdoor._mixing.merging import share_at, sign_elected
from unbackdoor._models.adapters import refuse_adapter
from unbackdoor._models.decoder_blocks import decoder_blocks
from unbackdoor._purification.run import Run
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._counterparts import distinct, names_in_base, pretrained
from unbackdoor.purifiers._low_rank import low_rank


@value
class InformationConflicts:
    """Tune the base on the clean examples, and merge this clean sibling with the suspect.

    The sibling knows the task and no trigger; where the two disagree, the merge has neither's answer in full. It is as
    safe as the sibling's share is large, and as good as the sibling is: without many clean examples, that is the base.

    Chen et al., "Neutralizing Backdoors through Information Conflicts for Large Language Models", 2024,
    https://arxiv.org/abs/2411.18280

    Args:
        merge: `linear`; `spherical`, along the arc between two tensors; `depth`, along the arc with a share that
            depends on the block: from 0 to 1 in attention, from 1 to 0 in feed-forward parts, 0.5 elsewhere; or
            `sign-elected` (TIES), which adds the changes of both on whose sign they agree to the base.
        share: share of the sibling in `linear` and `spherical`, 0 to 1; 1 is the sibling alone, the control.
        density: share of each change that stays in `sign-elected`, 0 to 1, the largest numbers first.
        rank: rank of the matrices that the sibling is tuned by, 1 to 4,096.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 2e-4 (AdamW).
        batch_size: examples per step, at least 2; None is 8.

    Differences from the paper: its body could not be read; this follows the authors' script. It tunes the sibling on
    the whole clean training set, in 4 bits, with batches of 128. Which end of the arc by depth is the sibling's is this
    project's choice. The second half of the paper, evidence that is added to prompts, changes no model.
    """

    merge: Literal["linear", "spherical", "depth", "sign-elected"] = "spherical"
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    density: Annotated[float, Field(ge=0, le=1)] = 0.5
    rank: Annotated[int, Field(ge=1, le=4096)] = 64
    epochs: Annotated[int, Field(ge=1)] = 4
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {"conversations": {"learning_rate": 2e-4}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_adapter(model, self)
        depth, weights = len(decoder_blocks(model, self)), distinct(model)
        names, base = names_in_base(weights, run, self), pretrained(run.needed("base", self))
        sibling = copy.deepcopy(run.needed("base", self)).to(next(model.parameters()).dtype)
        run.arithmetic.place(sibling)
        with low_rank(sibling, run, self, rank=self.rank):
            run.tune(
                sibling,
                clean,
                epochs=self.epochs,
                learning_rate=run.setting(self, "learning_rate"),
                batch_size=self.batch_size,
                description="tuning the sibling",
            )
        tuned = distinct(sibling)
        with torch.no_grad():
            for name, other in names.items():
                three = weights[name].cpu(), tuned[other].cpu(), base[other].cpu()
                weights[name].copy_(self.merged(name, *three, depth=depth))
        return model

    def merged(self, name: str, suspect: Tensor, sibling: Tensor, base: Tensor, *, depth: int) -> Tensor:
        """Returns the merge of one tensor.

        Args:
            name: name of the tensor in the suspect.
            suspect: the suspect's.
            sibling: the sibling's.
            base: the base's.
            depth: number of the model's blocks.
        """
        if self.merge == "sign-elected":
            return sign_elected(base.to(suspect.dtype), [suspect, sibling], self.density)
        share = share_at(name, depth) if self.merge == "depth" else self.share
        return mix(suspect, sibling, name, 1 - share, 0, "linear" if self.merge == "linear" else "spherical")
