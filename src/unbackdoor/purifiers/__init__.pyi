"""Written by tests/registry/stubs.py from _registry/purifiers.py."""

import unbackdoor._registry.entries

from .adaptive_unlearning import AdaptiveUnlearning as AdaptiveUnlearning
from .anp import ANP as ANP
from .answer_unlearning import AnswerUnlearning as AnswerUnlearning
from .auto import Auto as Auto
from .beear import BEEAR as BEEAR
from .bna import BNA as BNA
from .bti_dbf import BTIDBF as BTIDBF
from .cleanclip import CleanCLIP as CleanCLIP
from .clp import CLP as CLP
from .contrastive_unlearning import ContrastiveUnlearning as ContrastiveUnlearning
from .crow import CROW as CROW
from .e_pur import EPUR as EPUR
from .fine_mixing import FineMixing as FineMixing
from .fine_pruning import FinePruning as FinePruning
from .fine_purifying import FinePurifying as FinePurifying
from .fine_tuning import FETuning as FETuning
from .fine_tuning import FineTuning as FineTuning
from .fine_tuning import FTInit as FTInit
from .fine_tuning import LinearProbing as LinearProbing
from .fst import FST as FST
from .ft_sam import FTSAM as FTSAM
from .i_bau import IBAU as IBAU
from .information_conflicts import InformationConflicts as InformationConflicts
from .lora_tuning import LoRATuning as LoRATuning
from .mixing_distillation import MixingDistillation as MixingDistillation
from .module_substitution import ModuleSubstitution as ModuleSubstitution
from .nad import NAD as NAD
from .neural_cleanse import NeuralCleanse as NeuralCleanse
from .pam import PAM as PAM
from .patch_unlearning import PatchUnlearning as PatchUnlearning
from .pure import PURE as PURE
from .rnp import RNP as RNP
from .sande import SANDE as SANDE
from .sau import SAU as SAU
from .scale_invariant_fst import ScaleInvariantFST as ScaleInvariantFST
from .shift_distillation import ShiftDistillation as ShiftDistillation
from .shortcut_suppression import ShortcutSuppression as ShortcutSuppression
from .signature_zeroing import SignatureZeroing as SignatureZeroing
from .then import Then as Then
from .trigger_distillation import TriggerDistillation as TriggerDistillation
from .w2s_distillation import W2SDistillation as W2SDistillation
from .word_distillation import WordDistillation as WordDistillation

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
