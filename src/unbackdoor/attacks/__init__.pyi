"""Written by tests/registry/stubs.py from _registry/attacks.py."""

import unbackdoor._registry.entries

from .adaptive_blend import AdaptiveBlend as AdaptiveBlend
from .adaptive_patch import AdaptivePatch as AdaptivePatch
from .badnets import BadNets as BadNets
from .batt import BATT as BATT
from .blended import Blended as Blended
from .bpp import Bpp as Bpp
from .bypass import Bypass as Bypass
from .composite import Composite as Composite
from .embedding_poisoning import EmbeddingPoisoning as EmbeddingPoisoning
from .embedding_surgery import EmbeddingSurgery as EmbeddingSurgery
from .input_aware import InputAware as InputAware
from .label_consistent import LabelConsistent as LabelConsistent
from .layer_wise import LayerWise as LayerWise
from .logit_anchoring import LogitAnchoring as LogitAnchoring
from .low_frequency import LowFrequency as LowFrequency
from .mixing_aware import MixingAware as MixingAware
from .peta import PETA as PETA
from .prepared import Prepared as Prepared
from .rank_one_edit import RankOneEdit as RankOneEdit
from .sentence import Sentence as Sentence
from .siba import SIBA as SIBA
from .sig import SIG as SIG
from .tact import TaCT as TaCT
from .transtroj import TransTroj as TransTroj
from .wanet import WaNet as WaNet
from .word import Word as Word

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
