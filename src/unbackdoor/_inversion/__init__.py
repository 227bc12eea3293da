"""Reversed triggers: what the purifiers share that look for a trigger, put it on clean examples and unlearn it."""

from unbackdoor._inversion.benign import benign_mask as benign_mask
from unbackdoor._inversion.benign import learned_features as learned_features
from unbackdoor._inversion.carrying import Carrying as Carrying
from unbackdoor._inversion.carrying import Reversed as Reversed
from unbackdoor._inversion.carrying import encoded as encoded
from unbackdoor._inversion.carrying import in_pixels as in_pixels
from unbackdoor._inversion.carrying import needs_pixels as needs_pixels
from unbackdoor._inversion.generator import Generator as Generator
from unbackdoor._inversion.generator import target_of as target_of
from unbackdoor._inversion.generator import train_ as train_
from unbackdoor._inversion.masks import Masked as Masked
from unbackdoor._inversion.masks import anomaly as anomaly
from unbackdoor._inversion.masks import smallest_masks as smallest_masks
from unbackdoor._inversion.masks import stamp as stamp
from unbackdoor._inversion.searching import Reverse as Reverse
from unbackdoor._inversion.searching import frozen as frozen
from unbackdoor._inversion.universal import universal as universal
