"""Bounds on what a template of a stranger may take: Jinja's sandbox bounds what it may reach, not time and memory."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ConversionError


try:
    import resource
except ImportError:  # no such module on Windows
    resource = None

MAX_SECONDS = 10
MAX_BYTES = 500_000_000


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """
    Around the rendering of a template, in the main thread of a system that can interrupt it.

    Raises:
        ConversionError: naming `what`, if it takes more than any template needs.
    """
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooMuch

    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = _address_space() + MAX_BYTES
    limited = allowed > MAX_BYTES and (soft == resource.RLIM_INFINITY or allowed < soft)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    except (MemoryError, _TooMuch):
        raise ConversionError(
            f"{what} takes more than {MAX_SECONDS} seconds or {MAX_BYTES // 10**6} MB. Do not trust it; use another."
        ) from None
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


class _TooMuch(BaseException):
    """Past all handlers of the code that is bounded."""


def _address_space() -> int:
    """Of this process, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
