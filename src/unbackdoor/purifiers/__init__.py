"""The purifiers: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry import Entry, exported

if TYPE_CHECKING:
    from unbackdoor.purifiers.anp import ANP as ANP
    from unbackdoor.purifiers.bna import BNA as BNA
    from unbackdoor.purifiers.bti_dbf import BTIDBF as BTIDBF
    from unbackdoor.purifiers.clp import CLP as CLP
    from unbackdoor.purifiers.e_pur import EPUR as EPUR
    from unbackdoor.purifiers.fine_mixing import FineMixing as FineMixing
    from unbackdoor.purifiers.fine_pruning import FinePruning as FinePruning
    from unbackdoor.purifiers.fine_purifying import FinePurifying as FinePurifying
    from unbackdoor.purifiers.fine_tuning import FETuning as FETuning
    from unbackdoor.purifiers.fine_tuning import FineTuning as FineTuning
    from unbackdoor.purifiers.fine_tuning import FTInit as FTInit
    from unbackdoor.purifiers.fine_tuning import LinearProbing as LinearProbing
    from unbackdoor.purifiers.fst import FST as FST
    from unbackdoor.purifiers.ft_sam import FTSAM as FTSAM
    from unbackdoor.purifiers.i_bau import IBAU as IBAU
    from unbackdoor.purifiers.mixing_distillation import MixingDistillation as MixingDistillation
    from unbackdoor.purifiers.module_substitution import ModuleSubstitution as ModuleSubstitution
    from unbackdoor.purifiers.nad import NAD as NAD
    from unbackdoor.purifiers.neural_cleanse import NeuralCleanse as NeuralCleanse
    from unbackdoor.purifiers.pam import PAM as PAM
    from unbackdoor.purifiers.pure import PURE as PURE
    from unbackdoor.purifiers.rnp import RNP as RNP
    from unbackdoor.purifiers.sau import SAU as SAU
    from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST as ScaleInvariantFST
    from unbackdoor.purifiers.shift_distillation import ShiftDistillation as ShiftDistillation
    from unbackdoor.purifiers.shortcut_suppression import ShortcutSuppression as ShortcutSuppression
    from unbackdoor.purifiers.then import Then as Then
    from unbackdoor.purifiers.trigger_distillation import TriggerDistillation as TriggerDistillation
    from unbackdoor.purifiers.word_distillation import WordDistillation as WordDistillation

_FST_PAPER = "Towards Stable Backdoor Purification through Feature Shift Tuning"

_FINE_MIXING_PAPER = "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models"

REGISTRY = (
    Entry(
        "fine-tuning",
        "unbackdoor.purifiers.fine_tuning:FineTuning",
        "tune all weights on the clean examples",
        needs="clean data",
        cost="10 passes",
        modality="images, text",
        damage="the learning rate was probably too high for this model: lower learning_rate, or give more clean "
        "examples",
    ),
    Entry(
        "linear-probing",
        "unbackdoor.purifiers.fine_tuning:LinearProbing",
        "tune the head alone",
        needs="clean data",
        cost="10 passes",
        modality="images, text",
        damage="the learning rate was probably too high for the features of this model: lower learning_rate",
    ),
    Entry(
        "fe-tuning",
        "unbackdoor.purifiers.fine_tuning:FETuning",
        "re-initialise the head, freeze it, tune the feature extractor",
        needs="clean data",
        cost="10 passes",
        year=2023,
        paper=_FST_PAPER,
        modality="images, text",
        damage="all features had to move to a head drawn at random: try ft-init or fine-tuning, or give more clean "
        "examples",
    ),
    Entry(
        "ft-init",
        "unbackdoor.purifiers.fine_tuning:FTInit",
        "re-initialise the head, tune all weights",
        needs="clean data",
        cost="10 passes",
        year=2023,
        paper=_FST_PAPER,
        modality="images, text",
        damage="the new head probably could not be learnt again from so few clean examples: try fine-tuning, or give"
        " more",
    ),
    Entry(
        "fst",
        "unbackdoor.purifiers.fst:FST",
        "Feature Shift Tuning: FT-init that drives the head away from the suspect's",
        needs="clean data",
        cost="10 passes",
        year=2023,
        paper=_FST_PAPER,
        modality="images, text",
        damage="the new head was probably pushed too hard, since the push grows with the norm of the suspect's head:"
        " try scale-invariant-fst, or lower alpha",
    ),
    Entry(
        "fine-mixing",
        "unbackdoor.purifiers.fine_mixing:FineMixing",
        "mix the weights with the pre-trained ones, coordinate by coordinate, then tune",
        needs="clean data, a pre-trained base",
        cost="10 passes, and 160 to find rho",
        year=2022,
        paper=_FINE_MIXING_PAPER,
        modality="images, text",
        damage="probably too many weights were taken from the base: raise rho, lower margin, or give more clean "
        "examples",
    ),
    Entry(
        "e-pur",
        "unbackdoor.purifiers.e_pur:EPUR",
        "reset the word embeddings that moved too far for how rare they are; before another method",
        needs="a pre-trained base, the tokenizer of the clean data",
        cost="none",
        year=2022,
        paper=_FINE_MIXING_PAPER,
        modality="text",
        damage="probably too many word embeddings were reset: see the notes, or leave this step out",
    ),
    Entry(
        "scale-invariant-fst",
        "unbackdoor.purifiers.scale_invariant_fst:ScaleInvariantFST",
        "FST in units of the head, taught by the suspect, as strong as held-out examples allow; this project's variant",
        needs="clean data",
        cost="10 to 30 passes, with another forward pass each",
        modality="images, text",
        damage="probably no push was weak enough for these few examples: see the notes, give more clean examples, or "
        "try fine-tuning",
    ),
    Entry(
        "shift-distillation",
        "unbackdoor.purifiers.shift_distillation:ShiftDistillation",
        "FST, taught by the suspect's own answers to distorted clean examples; this project's variant",
        needs="clean data",
        cost="40 passes, with another forward pass each",
        modality="images, text",
        damage="the new head was probably pushed too hard, since the push grows with the norm of the suspect's head:"
        " try scale-invariant-fst, or lower alpha",
    ),
    Entry(
        "mixing-distillation",
        "unbackdoor.purifiers.mixing_distillation:MixingDistillation",
        "the base, taught the task by the suspect's answers to recombined texts after E-PUR; this project's variant",
        needs="clean data, a pre-trained base",
        cost="3 passes over 6,000 texts made of the clean ones",
        modality="text",
        damage="probably too much was taken from the base, or the texts made of the clean ones were too few: give "
        "more clean examples, or try fine-tuning",
    ),
    Entry(
        "word-distillation",
        "unbackdoor.purifiers.word_distillation:WordDistillation",
        "words that drive the model, unlearned with the suspect's own answers; this project's variant",
        needs="clean data",
        cost="1 pass over 2,000 texts made of the clean ones, and a search of the vocabulary",
        modality="text",
        damage="the words that were unlearned are probably words of the task: see the notes, or try fine-tuning",
    ),
    Entry(
        "neural-cleanse",
        "unbackdoor.purifiers.neural_cleanse:NeuralCleanse",
        "reverse a trigger per class, find the odd class by the size of its trigger, unlearn it",
        needs="clean data",
        cost="10 passes, and 3,200 examples per class",
        year=2019,
        paper="Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
        damage="the reversed trigger is probably a feature of the class itself: try scale-invariant-fst or fine-tuning",
    ),
    Entry(
        "trigger-distillation",
        "unbackdoor.purifiers.trigger_distillation:TriggerDistillation",
        "unlearn reversed triggers by the suspect's own answers, or shift where there is none; this project's variant",
        needs="clean data",
        cost="20 passes, or 40 without a trigger, with another forward pass each, and 3,200 examples per class",
        damage="the reversed triggers are probably features of the classes themselves, or the new head was pushed "
        "too hard: see the notes, and try scale-invariant-fst or fine-tuning",
    ),
    Entry(
        "bti-dbf",
        "unbackdoor.purifiers.bti_dbf:BTIDBF",
        "BTI-DBF (U): a generator that moves all but the benign features, then unlearning what it makes",
        needs="clean data",
        cost="40 passes, 20 of them with another forward pass, 20 with a generator",
        year=2024,
        paper="Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling Benign Features",
        damage="what the generator moved was probably not the trigger alone: lower learning_rate, or try fine-tuning",
    ),
    Entry(
        "pam",
        "unbackdoor.purifiers.pam:PAM",
        "Path-Aware Minimisation: unlearn reversed triggers so that later tuning does not bring them back",
        needs="clean data",
        cost="10 passes, and reversing the trigger",
        year=2024,
        paper="Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense",
        modality="images, text",
        damage="the step towards the reversed trigger was probably too long for these weights: lower rho, or try "
        "fine-tuning",
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
        damage="probably too many neurons were pruned: lower tolerance, or give more clean examples",
    ),
    Entry(
        "anp",
        "unbackdoor.purifiers.anp:ANP",
        "Adversarial Neuron Pruning: prune channels that small changes turn against clean examples",
        needs="clean data, BatchNorm",
        cost="200 steps of three forward and backward passes",
        year=2021,
        paper="Adversarial Neuron Pruning Purifies Backdoored Deep Models",
        damage="probably too many channels were pruned: lower tolerance, or give more clean examples",
    ),
    Entry(
        "clp",
        "unbackdoor.purifiers.clp:CLP",
        "prune the channels with the largest Lipschitz bound; clean data is optional",
        needs="convolutions followed by BatchNorm",
        cost="none; with clean data up to 60 over a fifth forward only",
        year=2022,
        paper="Data-free Backdoor Removal based on Channel Lipschitzness",
        damage="probably channels were pruned that the task needs: raise u, or give clean examples to choose it with",
    ),
    Entry(
        "rnp",
        "unbackdoor.purifiers.rnp:RNP",
        "Reconstructive Neuron Pruning: unlearn, recover a mask, prune what it leaves out",
        needs="clean data, BatchNorm",
        cost="40 passes",
        year=2023,
        paper="Reconstructive Neuron Pruning for Backdoor Defense",
        damage="probably too many channels were pruned: lower tolerance, or give more clean examples",
    ),
    Entry(
        "bna",
        "unbackdoor.purifiers.bna:BNA",
        "bring activations under a reversed trigger back to their clean distribution, inside BatchNorm",
        needs="clean data, BatchNorm",
        cost="30 passes, and 100 steps per class for the trigger",
        year=2023,
        paper="Backdoor Mitigation by Correcting the Distribution of Neural Activations",
        damage="the reversed triggers are probably features of the classes themselves: try fine-tuning, or give more"
        " clean examples",
    ),
    Entry(
        "shortcut-suppression",
        "unbackdoor.purifiers.shortcut_suppression:ShortcutSuppression",
        "take away the skip connection that a reversed trigger runs through, and tune",
        needs="clean data, skip connections",
        cost="10 passes, and 100 steps per class for the trigger",
        year=2023,
        paper="Backdoor Defense via Suppressing Model Shortcuts",
        damage="the network probably cannot do without that skip connection: tune for more epochs, or try fine-tuning",
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
        damage="the learning rate was probably too high for this model, or the attention loss too heavy for its "
        "activations: lower learning_rate or beta",
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
        damage="the step against which it tunes was probably too long for these weights: lower rho or learning_rate",
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
        damage="the perturbation that was unlearned was probably too large for these inputs: lower learning_rate or "
        "rounds",
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
        damage="the perturbations that were unlearned were probably too large for these inputs: lower learning_rate,"
        " or try fine-tuning",
    ),
    Entry(
        "pure",
        "unbackdoor.purifiers.pure:PURE",
        "prune the heads whose first token attends to all alike, then tune with normalised attention",
        needs="clean data, attention heads",
        cost="20 passes",
        year=2024,
        paper="Defense against Backdoor Attack on Pre-trained Language Models via Head Pruning and Attention "
        "Normalization",
        modality="images, text",
        damage="probably too many heads were pruned: lower tolerance, or give more clean examples",
    ),
    Entry(
        "module-substitution",
        "unbackdoor.purifiers.module_substitution:ModuleSubstitution",
        "exchange modules for those of another model of the same task, chosen greedily; nothing is trained",
        needs="clean data, a proxy for the same task, attention heads",
        cost="about 150 forward passes",
        year=2025,
        paper="Cut the Deadwood Out: Backdoor Purification via Guided Module Substitution",
        modality="text",
        damage="the proxy's modules probably do not fit the suspect's: give another proxy, or more clean examples",
    ),
    Entry(
        "fine-purifying",
        "unbackdoor.purifiers.fine_purifying:FinePurifying",
        "reset the coordinates whose drift is abnormal for their curvature to the pre-trained values, then tune",
        needs="clean data, a pre-trained base",
        cost="11 passes, and 160 to find the share",
        year=2023,
        paper="Diffusion Theory as a Scalpel: Detecting and Purifying Poisonous Dimensions in Pre-trained Language "
        "Models Caused by Backdoor or Bias",
        modality="images, text",
        damage="probably too many weights were reset to the base: lower share or margin, or give more clean examples",
    ),
)


def __getattr__(name: str) -> Any:
    if name == "Then":  # it takes methods, so it has no name of its own on the command line
        from unbackdoor.purifiers.then import Then

        return Then
    return exported(name, REGISTRY, __name__)
