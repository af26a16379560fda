"""The page of figures is what the files of results give, and the benchmarks run, on tiny settings."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: str, *options: str) -> dict:
    output = options[-1]
    subprocess.run([sys.executable, f"benchmarks/{script}", *options], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    return json.loads(Path(output).read_text())


def test_the_page_is_made_of_the_results():
    page = load("speed_page")
    assert page.PAGE.read_text() == page.page(), "run python benchmarks/speed_page.py"


def test_the_page_of_other_packages_is_made_of_the_results():
    held_out = load("held_out")
    report = json.loads(held_out.RESULTS.read_text())
    assert held_out.PAGE.read_text() == held_out.page(report), "run python benchmarks/held_out.py"
    for found in report["configs"].values():
        assert {name: found["ours"][name] for name in found["built"]} == found["built"]


def test_a_real_step_takes_what_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = load("step_memory")
    report = json.loads((ROOT / "benchmarks" / "results" / "step-memory.json").read_text())
    assert module.table(report) in (ROOT / "docs" / "cost.md").read_text()
    names = ("shape", "batch", "length", "dtype", "attention", "checkpointing")
    for row in report["rows"]:
        assert row["said"] == module.said(*(row[name] for name in names))
        assert row["said"]["step"] == pytest.approx(row["measured"]["allocated"], rel=0.1)
        assert row["said"]["step"] == pytest.approx(row["measured"]["resident"], rel=0.1)


def test_figures_of_conversion_are_made_of_their_results():
    page = load("conversion_page")
    if page.RESULT.is_file():
        assert page.PAGE.read_text() == page.page(), "run python benchmarks/conversion_page.py"
    else:
        assert page.BEGIN not in page.PAGE.read_text(), f"the figures were made of {page.RESULT}, which is not there"


def test_the_section_on_conversion_takes_its_place(tmp_path, monkeypatch):
    page = load("conversion_page")
    run = {
        "bytes": 6_000_000_000, "largest": 1e8, "cp": 9.0, "seconds": 12.0, "ratio": 0.75, "processor": 20.0, "start": 3.0,
        "own": 2e8, "resident": 5e8,
    }  # fmt: skip
    rows = [{**run, "type": kind, "function": name} for kind in ("llama", "gpt2") for name in ("convert", "export")]
    rows += [
        {"type": "llama", "function": "mergekit", "release": "1.2", "bytes": 6e9, "seconds": 30.5, "processor": 31.0,
         "own": 4e9},
        {"type": "gpt2", "function": "LitGPT", "bytes": 6e9, "absent": "no such model"},
    ]  # fmt: skip
    report = {"versions": "torch 9", "cores": 2, "load": 0.1, "shard_gb": 1, "repeats": 3, "rows": rows}
    monkeypatch.setattr(page, "RESULT", tmp_path / "conversion.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.RESULT.write_text(json.dumps(report))
    page.PAGE.write_text("Before.\n")
    for _ in range(2):
        page.PAGE.write_text(page.page())
    text = page.PAGE.read_text()
    assert text.startswith("Before.\n")
    assert text.count(page.BEGIN) == text.count(page.END) == 1
    assert "mergekit 1.2 | 6.0 | 30.5 | 31.0 | 4000 |" in text
    assert "LitGPT | 6.0 | not run: no such model" in text
    # 141.1 GB at 500 MB/s.
    assert "| 5 | 500 |" in text
    page.PAGE.write_text(text + "After.\n")
    assert page.page() == text + "After.\n"


@pytest.mark.whole
def test_decoding(tmp_path):
    report = run("decoding.py", "--shapes", "llama-8m", "t5-8m", "--contexts", "8", "--batches", "2", "--new-tokens", "4",
                 "--rounds", "3", "--threads", "1", "--patience", "0", "--output", str(tmp_path / "x.json"))  # fmt: skip
    for measured in report["measured"]:
        (row,) = measured["rows"]
        assert row["refused"] == {}
        for name, result in row["engines"].items():
            assert result["decode_s_per_step"]["median"] > 0
            # What rounds its weights may take other tokens.
            assert "int8" in name or result["tokens_as_stock"] == 1.0
        assert all(difference < 1e-4 for difference in row["logit_differences"].values())


@pytest.mark.whole
def test_exported_models_in_their_engines(tmp_path, monkeypatch):
    report = run("engines.py", "--shape", "llama-8m", "--contexts", "8", "--batches", "2", "--new-tokens", "4",
                 "--rounds", "3", "--threads", "1", "--patience", "0", "--output", str(tmp_path / "x.json"))  # fmt: skip
    (row,) = report["measured"][0]["rows"]
    assert row["refused"] == {}
    assert {"CTranslate2 float32", "onnxruntime float32", "ours plain", "ours fast"} <= row["engines"].keys()
    for name, result in row["engines"].items():
        assert "int8" in name or result["tokens_as_stock"] == 1.0
    page = load("speed_page")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert all(f"| {name} |" in page.engine_sections() for name in row["engines"])


@pytest.mark.whole
def test_training(tmp_path):
    report = run("training.py", "--shapes", "llama-8m", "--batch", "1", "--length", "32", "--rounds", "2", "--threads", "1",
                 "--contenders", "stock", "ours", "ours, loss in chunks of 256", "--patience", "0",
                 "--output", str(tmp_path / "x.json"))  # fmt: skip
    (row,) = report["rows"]
    stock, *ours = [result["losses"] for result in row["contenders"].values()]
    for losses in ours:
        assert losses == pytest.approx(stock, rel=1e-5)


def test_int8_kernels(monkeypatch):
    module = load("int8_kernels")
    monkeypatch.setattr(module, "COPIES", 2**15)
    made = module.measure((64, 64), rounds=3)
    assert len(made) >= 7
    for name, result in made.items():
        assert "refused" in result or result["seconds"]["best"] > 0, name
        # Of weights of 4 bits a tenth, of 8 a hundredth.
        bound = 0.2 if name.startswith("4") else 0.03
        assert "refused" in result or result["error"] < bound, name
    assert made["float32, ours"]["error"] < 1e-6
