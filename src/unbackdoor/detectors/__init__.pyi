"""Written by tests/registry/stubs.py from _registry/detectors.py."""

import unbackdoor._registry.entries

from .adapter_statistics import AdapterStatistics as AdapterStatistics
from .embedding_rows import EmbeddingRows as EmbeddingRows
from .embedding_rows import MovedRows as MovedRows
from .encoder_patch import EncoderPatch as EncoderPatch
from .lone_word import LoneWordScan as LoneWordScan
from .low_frequency_pattern import LowFrequencyPattern as LowFrequencyPattern
from .margin import Margin as Margin
from .noise import Noise as Noise
from .pairs import Pairs as Pairs
from .patch import Patch as Patch
from .pattern import Pattern as Pattern
from .phrase import PhraseGrowth as PhraseGrowth
from .prefix_battery import PrefixBattery as PrefixBattery
from .target_scan import TargetScan as TargetScan
from .vocabulary import VocabularyScan as VocabularyScan
from .warp import Warp as Warp
from .weight_spectrum import WeightSpectrum as WeightSpectrum

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
