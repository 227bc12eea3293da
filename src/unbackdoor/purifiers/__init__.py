"""The purifiers: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry.entries import exported
from unbackdoor._registry.purifiers import REGISTRY as REGISTRY

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


def __getattr__(name: str) -> Any:
    if name == "Then":  # it takes methods, so it has no name of its own on the command line
        from unbackdoor.purifiers.then import Then

        return Then
    return exported(name, REGISTRY, __name__)
