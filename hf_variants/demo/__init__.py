"""Demonstrations on real weights, one per kind of model."""

import importlib
from pathlib import Path


KINDS = ("decoder", "seq2seq", "encoder")


def run(output: Path, *, kind: str = "decoder", steps: int = 40) -> None:
    """
    Run one demo.

    Args:
        output: folder for the download and for every checkpoint made; created, or a folder of an earlier run.
        kind: one of `KINDS`.
        steps: optimiser steps of the fine-tuning.

    Raises:
        ValueError: `output` holds something else.
        OSError: the weights could not be downloaded, or are not the expected ones.
        RuntimeError: a proof failed.
    """
    importlib.import_module(f"{__name__}.{kind}").run(output, steps=steps)
