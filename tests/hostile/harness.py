"""Runs a command on an input and judges what came of it: it works, or it says in a sentence of its user what is wrong."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hf_variants_cli


MAX_SECONDS = 20
MAX_BYTES = 1_000_000_000
# The first thing that a program which asks whether to trust strangers would read.
ANSWERS = "y\nhello\n/exit\n"
# Touched by every harmless payload that runs after all.
MARK = "HF_VARIANTS_TEST_MARK"


@dataclass
class Outcome:
    """
    What a command did.

    Attributes:
        label: in the table: `"works"`, `"refused"` or what is wrong.
        faults: what breaks the rule; none where it was kept.
        seconds, memory: the time it took, and the bytes by which the process grew at its largest.
    """

    label: str
    said: str
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0


class _TooLong(BaseException):
    """Not an `Exception`, so that no command can take it for an error of its input."""


@contextlib.contextmanager
def _watch(outcome: Outcome, seconds: float) -> Iterator[None]:
    """Limits the time, and measures time and memory, where the system tells them."""

    def stop(*_: object) -> None:
        raise _TooLong

    before = _resident("VmRSS")
    _forget_the_peak()
    # Of the processor's time, which other programs do not change.
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    start = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        outcome.seconds = time.process_time() - start
        outcome.memory = _resident("VmHWM") - before


def _resident(what: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def _forget_the_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run(
    argv: Sequence[str],
    sandbox: Path,
    destination: Path | None = None,
    mentions: Sequence[str] = (),
    may_work: bool = True,
    writes: Sequence[Path] = (),
    if_it_works: Callable[[str], list[str]] = lambda said: [],
    seconds: float = MAX_SECONDS,
) -> Outcome:
    """
    Run one command in this process.

    Args:
        sandbox: folder that holds all the command may know of; nothing but `destination` and `writes` changes there.
        mentions: a refusal names one of these.
        may_work: whether success is no fault.
        if_it_works: given all that was printed, what is wrong with a success.
        seconds: of the processor's time, after which it is taken to hang.
    """
    outcome = Outcome("works", "")
    # The terminal's own streams are replaced, and with them the prompt: what is asked is seen here.
    out, err = io.StringIO(), io.StringIO()
    # `destination` may be a link of the case's own.
    before = _listing(sandbox, destination, writes)
    marked = Path(os.environ[MARK])
    stdin, sys.stdin = sys.stdin, io.StringIO(ANSWERS)
    # As in a process of its own, where what nobody handles is printed; pytest handles everything.
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    status: int | str
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _watch(outcome, seconds):
            status = hf_variants_cli.main(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 2
    except _TooLong:
        status = "hang"
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    finally:
        sys.stdin, root.handlers = stdin, handlers
    outcome.said = said = out.getvalue() + err.getvalue()
    faults = outcome.faults
    if status == 0:
        if not may_work:
            faults.append("damage taken without a word")
        faults += if_it_works(said)
    elif argv[0] == "verify" and status == 1:
        outcome.label = "differs"
    elif status in (1, 2):
        outcome.label = "refused"
        faults += _of_a_refusal(err.getvalue(), mentions)
        if destination is not None and (destination.is_dir() and any(destination.iterdir())):
            faults.append("left something at the destination")
    elif status == 3:
        faults.append("a fault in hf-variants")
    elif status == 130:
        outcome.label = "stopped"
    else:
        faults.append(f"ended with {status}")
    if outcome.memory > MAX_BYTES:
        faults.append(f"took {outcome.memory // 10**6} MB")
    if marked.exists():
        marked.unlink()
        faults.append("ran code of a stranger")
    if re.search(r"\[y/N\]|trust_remote_code|custom code which must", said):
        faults.append("offers to trust code")
    if strange := {c for c in said if (unicodedata.category(c) == "Cc" and c not in "\n\t\r") or c in "\u202e\u2066"}:
        faults.append(f"control characters on the terminal: {sorted(strange)!r}")
    elif "\r" in said.replace("\r\n", "") and "it/s" not in said and "|" not in said:
        faults.append("a carriage return on the terminal")
    if changed := _listing(sandbox, destination, writes) ^ before:
        faults.append(f"changed {sorted(changed)[:3]}")
    if faults:
        outcome.label = faults[0] if len(faults[0]) < 40 else faults[0][:40]
    return outcome


def _of_a_refusal(err: str, mentions: Sequence[str]) -> list[str]:
    """What a message lacks: two sentences, and a name."""
    if re.search(r"^usage: ", err, re.M):
        return []
    message = re.split(r"^error: ", err, flags=re.M)[-1].strip()
    faults = []
    # A sentence on what is wrong, and one on what to do.
    if not re.search(r"[.?!;:)] .*[.?!]$", message, re.S):
        faults.append("no remedy")
    if mentions and not any(word in message for word in (*mentions, "memory")):
        faults.append("names nothing")
    if "Traceback" in err:
        faults.append("a traceback")
    return faults


def _listing(sandbox: Path, destination: Path | None, writes: Sequence[Path]) -> set[str]:
    apart = [path for path in (destination, *writes) if path is not None]
    found = set()
    for folder, names, files in os.walk(sandbox):
        here = Path(folder)
        names[:] = [name for name in names if here / name not in apart]
        found |= {
            f"{(here / name).relative_to(sandbox)} {(here / name).lstat().st_size if name in files else ''}"
            for name in [*names, *files]
            if here / name not in apart
        }
    return found
