"""Two processes beside a test: what they found for each kind, from one launch for all of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from filelock import FileLock


ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests.tools.workers.distributed"


def launched(factory: pytest.TempPathFactory, command: str, names: Iterable[str]) -> dict[str, str]:
    """
    What `workers/distributed.py` says of each name: nothing where all is equal, or what is wrong.

    The first test that asks starts the processes, also among the workers of pytest-xdist; the others read.
    """
    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    names = list(names)
    folder = shared / f"{command} {len(names)} {names[0]}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.mkdir()
            (folder / "results.json").write_text(json.dumps(_run(folder, command, names)), encoding="utf-8")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _run(folder: Path, command: str, names: list[str]) -> dict[str, str]:
    finished = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0", "--module", WORKER, command, str(folder), *names,
        ],
        capture_output=True, text=True, check=False, timeout=500, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    # A rank that fails alone ends the launch: what is not there was not reached.
    unfinished = f"The launch ended before this was reached.\n{finished.stderr[-4000:]}"
    results = {}
    for name in names:
        path = folder / f"{name}.txt"
        results[name] = path.read_text(encoding="utf-8") if path.is_file() else unfinished
    return results
