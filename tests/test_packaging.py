"""What is installed is what the checkout holds."""

import importlib.metadata
import re
from pathlib import Path

import pytest


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_folder_is_shipped(project):
    setuptools = project["tool"]["setuptools"]
    mapped = {folder: name for name, folder in setuptools["package-dir"].items()}
    found = set()
    for top in ("hf_variants", "conversion", "docs", "model_cards"):
        for init in (ROOT / top).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT).as_posix()
            found.add(mapped.get(folder, folder.replace("/", ".")))
    assert found == set(setuptools["packages"])


def test_mapped_packages_import_beside_a_checkout():
    import hf_variants.conversion
    import hf_variants.model_cards

    assert hf_variants.conversion.__name__ == "hf_variants.conversion"
    assert hf_variants.model_cards.__name__ == "hf_variants.model_cards"


def test_the_table_that_the_doctor_reads_is_shipped(project):
    from hf_variants.doctor import TOOLS_PAGE

    assert project["tool"]["setuptools"]["package-data"]["hf_variants.docs"] == [TOOLS_PAGE]
    assert (ROOT / "docs" / TOOLS_PAGE).is_file()


def test_templates_of_cards_are_shipped(project):
    shipped = project["tool"]["setuptools"]["package-data"]["hf_variants.model_cards"]
    source = (ROOT / "hf_variants" / "card.py").read_text(encoding="utf-8")
    assert set(re.findall(r'TEMPLATES / "(\S+)"', source)) == set(shipped)
    assert all((ROOT / "model_cards" / name).is_file() for name in shipped)


def test_there_is_one_version(project):
    import hf_variants

    # A stale editable install would test another package than the one in the checkout.
    assert importlib.metadata.version("hf-variants") == hf_variants.__version__ == project["project"]["version"]


def test_constraints_satisfy_the_open_ranges(project):
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[requirement.name.replace("_", "-")] = str(requirement.specifier).removeprefix("==")
    for text in project["project"]["dependencies"]:
        requirement = Requirement(text)
        name = re.sub("_", "-", requirement.name)
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name])
