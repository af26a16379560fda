"""transformers' own testers, as far as its source archive on PyPI ships them: `python -m tests.suite.archive FOLDER`."""

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers


# The package that the testers make in FOLDER, and the modules that they import and the archive lacks.
PACKAGE = "transformers_tests"
STAND_INS = {
    "exporters/test_export.py": "from tests.suite.stand_ins import ExportTesterMixin",
    "generation/test_utils.py": "from tests.suite.generation import GenerationTesterMixin",
    "distributed_testing_utils.py": "from tests.suite.stand_ins import *",
}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def fetch(folder: Path) -> None:
    """Unpack the testers of the installed transformers, once."""
    version = transformers.__version__
    done = folder / f".{version}"
    if done.exists():
        return
    name = f"transformers-{version}"
    pip("download", "--no-deps", "--no-binary=:all:", f"transformers=={version}", "--dest", str(folder))
    pip("install", "--no-deps", "--upgrade", "--target", str(folder), "parameterized")
    package = folder / PACKAGE
    package.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        for member in archive:
            path = Path(member.name)
            if path.parent == Path(name, "tests") and path.suffix == ".py":
                package.joinpath(path.name).write_bytes(archive.extractfile(member).read())
    for path, line in STAND_INS.items():
        if not (package / path).exists():
            (package / path).parent.mkdir(exist_ok=True)
            (package / path).write_text(line + "\n")
    for path in {package, *(package.joinpath(path).parent for path in STAND_INS)}:
        path.joinpath("__init__.py").touch()
    done.touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)
