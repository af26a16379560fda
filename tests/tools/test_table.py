"""docs/tools.md says what the tests here show: no more, no less, and nothing that failed."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def without_versions(text: str) -> list[str]:
    """A table's lines without its second column: users and CI may have other releases."""
    return ["|".join(line.split("|")[:2] + line.split("|")[3:]) for line in text.splitlines()]


def test_the_page_is_current(tmp_path):
    command = [sys.executable, "-m", "pytest", "tests/tools", "--collect-only", "-q"]
    finished = subprocess.run(
        [*command, f"--tools-table={tmp_path / 'tools.md'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-2000:]
    expected = (tmp_path / "tools.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    assert without_versions(page) == without_versions(expected), "Run `make test-all`, which writes docs/tools.md."
