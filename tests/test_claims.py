"""The claims' plans can be run, and their pages are what the results say."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.claims import __main__ as claims
from benchmarks.claims import gqa
from hf_variants.ablate import Results, read_plan
from hf_variants.ablate.plan import Plan, arms, read_plan_data
from hf_variants.ablate.report import verdicts


@pytest.mark.parametrize("name", claims.names())
def test_every_plan_makes_equal_models(name, tmp_path):
    plan, place = read_plan(claims.PLANS / f"{name}.yaml")
    letters = np.random.default_rng(0).choice(list("abcdefgh \n"), 300_000)
    (tmp_path / "text.txt").write_text("".join(letters))
    plan = Plan(**{**vars(plan), "data": {**plan.data, "text": str(tmp_path / "text.txt")}})
    made = arms(plan, read_plan_data(plan, place))
    assert plan.seeds >= 5
    assert {arm.name for arm in made} == set(plan.configs)
    assert len({arm.training.batch_size for arm in made}) == 1
    if plan.equal == "parameters":
        counts = [arm.parameters for arm in made]
        assert max(counts) < 1.01 * min(counts)


def test_pages_are_what_the_results_say(tmp_path, monkeypatch):
    """`python -m benchmarks.claims --pages` writes what is there."""
    docs = claims.PAGES.parent
    monkeypatch.setattr(claims, "PAGES", tmp_path / "claims")
    claims.write_pages()

    def files(folder: Path) -> dict[str, str]:
        found = [*(folder / "claims").iterdir(), *(folder / "architecture").iterdir(), folder / "architecture.md"]
        return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in found}

    assert files(tmp_path) == files(docs)


@pytest.mark.parametrize("path", sorted(claims.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_control_failed_and_every_verdict_is_in_the_log(path):
    summary = json.loads(path.read_text(encoding="utf-8"))
    assert summary["control"] is None or summary["control"]["failed"]
    log = claims.LOG.read_text(encoding="utf-8")
    assert all(f"- {verdict}\n" in log for verdict in verdicts(summary))


def test_heads_are_pooled_taken_or_drawn(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, " * 400)
    plan = Plan(
        "", {"mha": {}}, {"text": str(tmp_path / "text.txt"), "tokens": "characters", "length": 16},
        reference="mha", seeds=2,
        base={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        training={"steps": 20, "batch_size": 2}, noise=False, control=0,
    )  # fmt: skip
    data = read_plan_data(plan, tmp_path)
    (arm,) = arms(plan, data)
    records, made = gqa.run(plan, arm, data, tmp_path / "out")
    assert {each.name for each in made} == {each["config"] for each in records}
    plan = Plan(**{**vars(plan), "configs": {each.name: {} for each in made}})
    assert "give back" in gqa.recovery(Results(plan, records))
    # What was run once is kept.
    assert gqa.run(plan, arm, data, tmp_path / "out")[0] == records
