"""Random draws that belong to an input: the same in any batch, at any place of it."""

import hashlib
import random
from collections.abc import Hashable


def draws_for(identity: Hashable, seed: int) -> random.Random:
    """Returns a generator for one input.

    Args:
        identity: of the input, as `Dataset.identities` returns it.
        seed: of the guard.
    """
    plain = identity if isinstance(identity, bytes) else repr(identity).encode()
    return random.Random(hashlib.sha256(seed.to_bytes(8) + plain).digest())
