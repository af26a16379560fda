"""How much memory this process has had."""

import resource
import sys
from pathlib import Path


def most_resident() -> int:
    """
    The most bytes that this process was resident in, since its program began.

    On Linux from /proc: what `getrusage` says there begins at the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
