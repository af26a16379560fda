"""The pages that are made from the code, and code that pages show."""

import re
from pathlib import Path

import pytest
import transformers

import hf_variants_cli
from hf_variants.conversion.catalogue import families_markdown


ROOT = Path(__file__).parent.parent


def test_the_page_of_families_is_up_to_date():
    page = (ROOT / "docs" / "families.md").read_text()
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip("the page was made with another transformers")
    assert page == families_markdown(), "run `hf-variants families --markdown > docs/families.md`"


def test_the_command_prints_the_page(capsys):
    assert hf_variants_cli.main(["families", "--markdown"]) == 0
    assert capsys.readouterr().out == families_markdown()


def test_every_type_is_on_the_page_with_its_classes_and_every_refusal_with_its_reason():
    page = families_markdown()
    assert "| `llama` | `LlamaModel`, `LlamaForCausalLM`, `LlamaForSequenceClassification`" in page
    assert "| `mixtral` | mixture-of-experts feed-forward layers |" in page
    assert all(line.count(" | ") in (1, 3) for line in page.splitlines() if line.startswith("| `"))


def test_the_example_of_a_family_is_a_family():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    path, code = re.search(r"This is all of `([\w/.]+)`:\n\n```python\n(.*?)```", text, flags=re.DOTALL).groups()
    assert (ROOT / path).read_text() == code


def test_the_readme_links_to_the_page():
    assert "(docs/families.md)" in (ROOT / "README.md").read_text()
