"""What Python's collector of cyclic garbage goes through while a command runs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_garbage() -> Iterator[None]:
    """
    Leave what was there before out of collections: torch and transformers alone make 400,000 objects, which take a quarter
    of a second each time that a large JSON file sets one off.
    """
    is_mine = gc.isenabled() and not gc.get_freeze_count()
    if is_mine:
        gc.freeze()
    try:
        yield
    finally:
        if is_mine:
            gc.unfreeze()
