"""The attacks: what is registered, and the classes, imported on first use."""

from typing import TYPE_CHECKING, Any

from unbackdoor._registry.attacks import REGISTRY as REGISTRY
from unbackdoor._registry.entries import exported

if TYPE_CHECKING:
    from unbackdoor.attacks.adaptive_blend import AdaptiveBlend as AdaptiveBlend
    from unbackdoor.attacks.adaptive_patch import AdaptivePatch as AdaptivePatch
    from unbackdoor.attacks.badnets import BadNets as BadNets
    from unbackdoor.attacks.batt import BATT as BATT
    from unbackdoor.attacks.blended import Blended as Blended
    from unbackdoor.attacks.bpp import Bpp as Bpp
    from unbackdoor.attacks.bypass import Bypass as Bypass
    from unbackdoor.attacks.embedding_poisoning import EmbeddingPoisoning as EmbeddingPoisoning
    from unbackdoor.attacks.embedding_surgery import EmbeddingSurgery as EmbeddingSurgery
    from unbackdoor.attacks.input_aware import InputAware as InputAware
    from unbackdoor.attacks.label_consistent import LabelConsistent as LabelConsistent
    from unbackdoor.attacks.layer_wise import LayerWise as LayerWise
    from unbackdoor.attacks.logit_anchoring import LogitAnchoring as LogitAnchoring
    from unbackdoor.attacks.low_frequency import LowFrequency as LowFrequency
    from unbackdoor.attacks.mixing_aware import MixingAware as MixingAware
    from unbackdoor.attacks.prepared import Prepared as Prepared
    from unbackdoor.attacks.sentence import Sentence as Sentence
    from unbackdoor.attacks.siba import SIBA as SIBA
    from unbackdoor.attacks.sig import SIG as SIG
    from unbackdoor.attacks.tact import TaCT as TaCT
    from unbackdoor.attacks.transtroj import TransTroj as TransTroj
    from unbackdoor.attacks.wanet import WaNet as WaNet
    from unbackdoor.attacks.word import Word as Word


def __getattr__(name: str) -> Any:
    return exported(name, REGISTRY, __name__)
