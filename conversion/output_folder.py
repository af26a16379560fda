"""The folder that a command writes: a new one beside its place, which it takes when all is well, and on the disk."""

import errno
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, logging

from .progress import PROGRESS, Progress


try:
    import fcntl
except ImportError:  # no such module on Windows
    fcntl = None

logger = logging.get_logger(__name__)

UNFINISHED = "unfinished"


def _is_leftover(path: Path, target: Path) -> bool:
    """Whether it is what a run for `target` was in when it was killed."""
    is_named_so = re.fullmatch(re.escape(f".{target.name}.{UNFINISHED}-") + r"\w{8}", path.name)
    return bool(is_named_so) and path.is_dir() and not path.is_symlink()


def refuse_occupied(destination: str | Path) -> None:
    """`FileExistsError` if a folder could not become `destination`: asked before long work, and again by `new_folder`."""
    target = Path(destination).expanduser()
    if target.exists() and (
        not target.is_dir() or any(not _is_leftover(path, target.resolve()) for path in target.iterdir())
    ):
        raise FileExistsError(f"{destination} exists and is not empty. Choose another folder or remove it.")


@contextmanager
def new_folder(destination: str | Path, task: str | None = None) -> Iterator[Path]:
    """
    A temporary folder beside `destination` that becomes it when the block ends well, and vanishes otherwise, also when
    the process is told to end. What earlier runs left behind when they were killed is named and removed, or gone on with.

    Args:
        task: what is done, as `Progress` knows it, where an earlier run of the same may be gone on with; the folder then
            holds its progress, and files of which only that says whether they are whole.

    Raises:
        FileExistsError: if `destination` exists and is not empty.
    """
    target = Path(destination).expanduser()
    refuse_occupied(destination)
    # Such a folder cannot be replaced: it is filled.
    stays = target.is_dir() and (os.path.ismount(target) or target.samefile(os.curdir))
    target = target.resolve()
    place = target if stays else target.parent
    place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        temporary = _leftover(target, place, task, held)
        if temporary is None:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.{UNFINISHED}-", dir=place))
            held.enter_context(_held(temporary))
        held.enter_context(_ended_by_signal())
        try:
            yield temporary
            # Together: a file system writes its journal once for all that wait for it.
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(_flush, [path for path in temporary.rglob("*") if path.is_file()]))
            (temporary / PROGRESS).unlink(missing_ok=True)
            _flush(temporary)
            if stays:
                # What makes it a checkpoint comes last.
                for path in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                    path.rename(target / path.name)
                temporary.rmdir()
            else:
                if target.exists():
                    target.rmdir()
                temporary.chmod(0o755)
                temporary.rename(target)
            _flush(place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _flush(path: Path) -> None:
    """Have the system write a file or the entries of a folder to the disk, where it can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder as this process's own, until it ends in whatever way; whether that was possible."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _leftover(target: Path, place: Path, task: str | None, held: ExitStack) -> Path | None:
    """
    What a run of the same task left behind when it was killed, in which to go on, held from now on. Those that runs of
    other tasks left for the destination are removed; those of runs that still go on are held by them.
    """
    found: Path | None = None
    inside = target.iterdir() if target.is_dir() else ()
    for path in sorted([*target.parent.iterdir(), *inside]):
        if not _is_leftover(path, target):
            continue
        with ExitStack() as until_here:
            if not until_here.enter_context(_held(path)):
                continue
            if found is None and task is not None and path.parent == place and Progress.task_in(path) == task:
                logger.warning(f"Going on in {path}, which an earlier run left unfinished.")
                found = path
                held.enter_context(until_here.pop_all())
            else:
                logger.warning(f"Removing {path}, which an earlier run left unfinished.")
                shutil.rmtree(path, ignore_errors=True)
    return found


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, where nobody else handles it."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
