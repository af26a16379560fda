"""The table of docs/tools.md: which tool was run on which kind of variant, collected from the tests themselves.

A test says what it runs with `@pytest.mark.tool("PEFT: LoRA", package="peft")` and takes its kind from the parameter `kind`.
`contract=True` says that what the tool demands was tested and not the tool itself, which needs what no test machine has, and
then there is no package;
`refused=True` that the test shows the combination refused, with a message. The hooks are loaded by tests/conftest.py.
"""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from .kinds import KINDS


HEADER = """\
# Tools and kinds of variant

Made by `make test-all` from the tests that ran; do not edit. Each cell is the outcome of at least one test in
`tests/tools/` on two CPU cores, with small random weights and the real tool in the version given.

- **runs**: the tool did its job on this kind, and the test checked the result.
- **contract**: what the tool asks of a model was checked, not the tool itself, which does not run on a CPU or from PyPI.
- **refused**: the combination is refused with a message that says what to do instead, and the test checked that.
- **-**: not run: it does not apply (preference tuning wants a decoder, say), or another kind stands for this one.

"""


def pytest_addoption(parser):
    parser.addoption("--tools-table", metavar="FILE", type=Path, help="write the table of tools and kinds to FILE")


def pytest_configure(config):
    config.addinivalue_line("markers", "tool(name, package, contract, refused): what a row of docs/tools.md shows")
    if config.getoption("--tools-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(config.getoption("--tools-table")), "tools-table")


def pytest_collection_modifyitems(items):
    for item in items:
        if cell := described(item):
            # Properties travel from the workers to the process that reports.
            item.user_properties.append(("tool", cell))


def described(item) -> tuple[str, str, str, str] | None:
    """Row, package, kind and what a passing test puts into the cell; `None` for a test of no tool."""
    marker = item.get_closest_marker("tool")
    if marker is None:
        return None
    kind = item.callspec.params["kind"]
    cell = "contract" if marker.kwargs.get("contract") else "refused" if marker.kwargs.get("refused") else "runs"
    return marker.args[0], marker.kwargs.get("package", ""), kind, cell


class Table:
    """Collects reports and writes the table at the end; a cell with a failed test says so."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            # A test that is skipped, or whose setup fails, has no call.
            if name == "tool" and (report.when == "call" or not report.passed):
                row, package, kind, cell = value
                self.cells[row, package][kind].add(cell if report.passed else report.outcome)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        # With --collect-only the table is what it would be if every test passed.
        if session.config.option.collectonly:
            for row, package, kind, cell in filter(None, map(described, session.items)):
                self.cells[row, package][kind].add(cell)

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(HEADER + self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        columns = [*KINDS, *sorted({kind for row in self.cells.values() for kind in row} - set(KINDS))]
        lines = [f"| tool | version | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for (row, package), cells in sorted(self.cells.items()):
            # The worst news first: a failure is not hidden by another test that passed.
            shown = (next((word for word in ORDER if word in cells[kind]), "-") for kind in columns)
            release = f"{package} {_version(package)}" if package else "-"
            lines.append(f"| {row} | {release} | {' | '.join(shown)} |")
        return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    # `make test` collects tests of tools that are not installed.
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


ORDER = ("failed", "skipped", "refused", "contract", "runs")
