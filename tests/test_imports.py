"""Who imports whom: inside a package, files form no circle."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def imports(folder: Path) -> dict[str, set[str]]:
    """
    For every file of a folder, the files beside it that it imports when it is imported itself: not for types alone, nor
    inside a function, which is how `verify` reaches the comparison with bounded memory.
    """
    names = {path.stem for path in folder.glob("*.py")}
    arrows = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed_over = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ]
        later = {id(inner) for node in passed_over for inner in ast.walk(node)}
        arrows[path.stem] = {
            target
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in later
            for target in ([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
            if target in names
        }
    return arrows


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """The files that reach themselves."""
    reached = {name: set(targets) for name, targets in arrows.items()}
    for middle in arrows:
        for name in arrows:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return {name for name in arrows if name in reached[name]}


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}


@pytest.mark.parametrize("folder", ["hf_variants/model", "hf_variants", "conversion", "conversion/adapters"])
def test_files_form_no_circle(folder):
    arrows = imports(ROOT / folder)
    assert any(arrows.values())
    assert circles(arrows) == set()
