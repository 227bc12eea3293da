"""The purifiers: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry import Entry, exported

if TYPE_CHECKING:
    from unbackdoor.purifiers.anp import ANP as ANP
    from unbackdoor.purifiers.bna import BNA as BNA
    from unbackdoor.purifiers.clp import CLP as CLP
    from unbackdoor.purifiers.fine_pruning import FinePruning as FinePruning
    from unbackdoor.purifiers.fine_tuning import FETuning as FETuning
    from unbackdoor.purifiers.fine_tuning import FineTuning as FineTuning
    from unbackdoor.purifiers.fine_tuning import FTInit as FTInit
    from unbackdoor.purifiers.fine_tuning import LinearProbing as LinearProbing
    from unbackdoor.purifiers.fst import FST as FST
    from unbackdoor.purifiers.rnp import RNP as RNP
    from unbackdoor.purifiers.shift_distillation import ShiftDistillation as ShiftDistillation
    from unbackdoor.purifiers.shortcut_suppression import ShortcutSuppression as ShortcutSuppression
    from unbackdoor.purifiers.then import Then as Then

_FST_PAPER = "Towards Stable Backdoor Purification through Feature Shift Tuning"

REGISTRY = (
    Entry(
        "fine-tuning",
        "unbackdoor.purifiers.fine_tuning:FineTuning",
        "tune all weights on the clean examples",
        needs="clean data",
        cost="10 passes",
    ),
    Entry(
        "linear-probing",
        "unbackdoor.purifiers.fine_tuning:LinearProbing",
        "tune the head alone",
        needs="clean data",
        cost="10 passes",
    ),
    Entry(
        "fe-tuning",
        "unbackdoor.purifiers.fine_tuning:FETuning",
        "re-initialise the head, freeze it, tune the feature extractor",
        needs="clean data",
        cost="10 passes",
        year=2023,
        paper=_FST_PAPER,
    ),
    Entry(
        "ft-init",
        "unbackdoor.purifiers.fine_tuning:FTInit",
        "re-initialise the head, tune all weights",
        needs="clean data",
        cost="10 passes",
        year=2023,
        paper=_FST_PAPER,
    ),
    Entry(
        "fst",
        "unbackdoor.purifiers.fst:FST",
        "Feature Shift Tuning: FT-init that drives the head away from the suspect's",
        needs="clean data",
        cost="10 passes",
        year=2023,
        paper=_FST_PAPER,
    ),
    Entry(
        "shift-distillation",
        "unbackdoor.purifiers.shift_distillation:ShiftDistillation",
        "FST, taught by the suspect's own answers to distorted clean examples; this project's variant",
        needs="clean data",
        cost="40 passes, with another forward pass each",
    ),
    Entry(
        "fine-pruning",
        "unbackdoor.purifiers.fine_pruning:FinePruning",
        "prune neurons that are dormant on clean examples, then tune",
        needs="clean data",
        cost="10 passes, and up to 100 over a fifth forward only",
        year=2018,
        paper="Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        modality="images, text",
    ),
    Entry(
        "anp",
        "unbackdoor.purifiers.anp:ANP",
        "Adversarial Neuron Pruning: prune channels that small changes turn against clean examples",
        needs="clean data, BatchNorm",
        cost="200 steps of three forward and backward passes",
        year=2021,
        paper="Adversarial Neuron Pruning Purifies Backdoored Deep Models",
    ),
    Entry(
        "clp",
        "unbackdoor.purifiers.clp:CLP",
        "prune the channels with the largest Lipschitz bound; clean data is optional",
        needs="convolutions followed by BatchNorm",
        cost="none; with clean data up to 60 over a fifth forward only",
        year=2022,
        paper="Data-free Backdoor Removal based on Channel Lipschitzness",
    ),
    Entry(
        "rnp",
        "unbackdoor.purifiers.rnp:RNP",
        "Reconstructive Neuron Pruning: unlearn, recover a mask, prune what it leaves out",
        needs="clean data, BatchNorm",
        cost="40 passes",
        year=2023,
        paper="Reconstructive Neuron Pruning for Backdoor Defense",
    ),
    Entry(
        "bna",
        "unbackdoor.purifiers.bna:BNA",
        "bring activations under a reversed trigger back to their clean distribution, inside BatchNorm",
        needs="clean data, BatchNorm",
        cost="30 passes, and 100 steps per class for the trigger",
        year=2023,
        paper="Backdoor Mitigation by Correcting the Distribution of Neural Activations",
    ),
    Entry(
        "shortcut-suppression",
        "unbackdoor.purifiers.shortcut_suppression:ShortcutSuppression",
        "take away the skip connection that a reversed trigger runs through, and tune",
        needs="clean data, skip connections",
        cost="10 passes, and 100 steps per class for the trigger",
        year=2023,
        paper="Backdoor Defense via Suppressing Model Shortcuts",
    ),
)


def __getattr__(name: str) -> Any:
    if name == "Then":  # it takes methods, so it has no name of its own on the command line
        from unbackdoor.purifiers.then import Then

        return Then
    return exported(name, REGISTRY, __name__)
