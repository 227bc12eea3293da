"""Reversed triggers: what the purifiers share that look for a trigger, put it on clean examples and unlearn it."""

from unbackdoor._reverse._benign import benign_mask as benign_mask
from unbackdoor._reverse._benign import learned_features as learned_features
from unbackdoor._reverse._carrying import Carrying as Carrying
from unbackdoor._reverse._carrying import Reversed as Reversed
from unbackdoor._reverse._carrying import encoded as encoded
from unbackdoor._reverse._carrying import in_pixels as in_pixels
from unbackdoor._reverse._carrying import needs_pixels as needs_pixels
from unbackdoor._reverse._generator import Generator as Generator
from unbackdoor._reverse._generator import target_of as target_of
from unbackdoor._reverse._generator import train_ as train_
from unbackdoor._reverse._masks import Masked as Masked
from unbackdoor._reverse._masks import anomaly as anomaly
from unbackdoor._reverse._masks import smallest_masks as smallest_masks
from unbackdoor._reverse._masks import stamp as stamp
from unbackdoor._reverse._searching import Reverse as Reverse
from unbackdoor._reverse._searching import frozen as frozen
from unbackdoor._reverse._universal import universal as universal
