"""The purifiers: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry import Entry, exported

if TYPE_CHECKING:
    from unbackdoor.purifiers.fine_tuning import FETuning as FETuning
    from unbackdoor.purifiers.fine_tuning import FineTuning as FineTuning
    from unbackdoor.purifiers.fine_tuning import FTInit as FTInit
    from unbackdoor.purifiers.fine_tuning import LinearProbing as LinearProbing
    from unbackdoor.purifiers.fst import FST as FST
    from unbackdoor.purifiers.ft_sam import FTSAM as FTSAM
    from unbackdoor.purifiers.i_bau import IBAU as IBAU
    from unbackdoor.purifiers.nad import NAD as NAD
    from unbackdoor.purifiers.sau import SAU as SAU
    from unbackdoor.purifiers.shift_distillation import ShiftDistillation as ShiftDistillation
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
        "nad",
        "unbackdoor.purifiers.nad:NAD",
        "Neural Attention Distillation: look where a fine-tuned copy of the suspect looks",
        needs="clean data, convolutions or transformer blocks",
        cost="30 passes, 20 of them with another forward pass",
        year=2021,
        paper="Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks",
        modality="images, text",
    ),
    Entry(
        "ft-sam",
        "unbackdoor.purifiers.ft_sam:FTSAM",
        "fine-tuning by adaptive sharpness-aware minimisation",
        needs="clean data",
        cost="20 passes, each twice",
        year=2023,
        paper="Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
        modality="images, text",
    ),
    Entry(
        "i-bau",
        "unbackdoor.purifiers.i_bau:IBAU",
        "unlearn the perturbation that fools the model on all examples, by its implicit derivative",
        needs="clean data",
        cost="3 rounds of about 3 forward, 3 backward and 5 second backward passes",
        year=2022,
        paper="Adversarial Unlearning of Backdoors via Implicit Hypergradient",
        modality="images, text",
    ),
    Entry(
        "sau",
        "unbackdoor.purifiers.sau:SAU",
        "unlearn the perturbations that lead the suspect and the model to the same wrong class",
        needs="clean data",
        cost="10 passes of about 16 forward and 11 backward",
        year=2023,
        paper="Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples",
        modality="images, text",
    ),
)


def __getattr__(name: str) -> Any:
    if name == "Then":  # it takes methods, so it has no name of its own on the command line
        from unbackdoor.purifiers.then import Then

        return Then
    return exported(name, REGISTRY, __name__)
