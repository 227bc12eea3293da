"""What the machine says of the process."""

import resource
import sys


def peak_memory() -> int:
    """The most memory that this process has held resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
