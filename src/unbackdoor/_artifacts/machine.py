"""Facts about the process and its software, for records."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes.

    Linux: VmHWM of /proc/self/status. `ru_maxrss` is not used there if it can be avoided, since a process that was
    forked from a large one keeps the parent's peak in it, even after exec. Windows: the peak working set, by psutil.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    try:
        held = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:  # no /proc: macOS, BSD
        held = None
    if held is not None:
        return 1024 * int(held[1])
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on: unbackdoor, torch and Python."""
    import torch

    return {
        "unbackdoor": version("unbackdoor"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
