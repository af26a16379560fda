"""Plans of configs that are trained beside each other: data with known answers, equal cost, pairing, resuming, p-values."""

import json
import math
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy import stats

import hf_variants
import hf_variants.ablate as ablation
import hf_variants_cli
from hf_variants.ablate import PlanError, ablate, read_plan
from hf_variants.ablate import train as training_module
from hf_variants.ablate.data import read_data, stack
from hf_variants.ablate.plan import Plan, arms, read_plan_data
from hf_variants.ablate.probes import cross_entropy, probe, score
from hf_variants.ablate.statistics import Results, holm, p_value
from hf_variants.ablate.tasks import IGNORED, make_task
from hf_variants.charts import Series, bar_chart, line_chart


BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
RECALL = {"task": "recall", "pairs": 3, "keys": 8, "values": 8}
PLAN = {
    "title": "A plan", "base": BASE, "data": RECALL, "seeds": 2,
    "configs": {"rope": {}, "none": {"position_embedding_type": "none"}},
    "training": {"steps": 4, "batch_size": 4}, "learning_rates": [1e-3, 1e-2],
}  # fmt: skip


def plan_of(**changes):
    return {**PLAN, **changes}


def recalled(tokens, position):
    """The value that stood behind the key before a position."""
    first = tokens.tolist().index(tokens[position - 1])
    return tokens[first + 1]


def after_same(tokens, position):
    """What came after the first place of the token before."""
    return tokens[tokens.tolist().index(tokens[position - 1]) + 1]


def copied(tokens, position):
    return tokens[position - len(tokens) // 2 - 1]


def summed(tokens, position):
    return (tokens[0] + tokens[1]) % tokens[2]


@pytest.mark.parametrize(
    ("name", "options", "answer"),
    [
        ("recall", {"pairs": 5, "keys": 9, "values": 7}, recalled),
        ("induction", {"tokens": 12, "symbols": 20}, after_same),
        ("copy", {"tokens": 6, "symbols": 5}, copied),
        ("modular", {"prime": 7}, summed),
    ],
)
def test_answers_follow_from_what_stands_before(name, options, answer):
    task = make_task(name, options)
    asked = set()
    for index in range(50):
        tokens, labels = task.example(np.random.default_rng(index), task.size(), held_out=False)
        positions = [position for position, label in enumerate(labels) if label != IGNORED]
        assert len(tokens) == task.length(task.size())
        assert tokens.min() >= 0
        assert tokens.max() < task.vocab_size
        assert (
            [labels[p] for p in positions] == [tokens[p] for p in positions] == [answer(tokens, p) for p in positions]
        )
        asked.update(tokens[p] for p in positions)
    # No answer can be guessed from how few there are.
    assert len(asked) > task.choices // 2


def test_modular_pairs_of_the_test_are_never_trained_on():
    task = make_task("modular", {"prime": 5})
    seen = [
        {tuple(task.example(np.random.default_rng(i), 1, held_out)[0][:2]) for i in range(400)}
        for held_out in (True, False)
    ]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 25


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["see ", "sun ", "sea ", "sum\n"], 4000)
    path = tmp_path / "text.txt"
    path.write_text("".join(words))
    return path


@pytest.mark.parametrize("tokens", ["bytes", "characters"])
def test_a_text_is_gone_through_once_before_anything_repeats(text, tokens):
    data = read_data({"text": str(text), "tokens": tokens, "length": 32}, text.parent)
    trained = text.read_text()[: len(text.read_text()) - 2 * data.kept_back]
    assert data.windows == len(trained) // 32
    windows = [data.example(3, index)["input_ids"] for index in range(2 * data.windows)]
    first, second = ({tuple(w.tolist()) for w in half} for half in (windows[: data.windows], windows[data.windows :]))
    assert first == second
    assert [w.tolist() for w in windows[: data.windows]] != [w.tolist() for w in windows[data.windows :]]
    assert [data.example(4, i)["input_ids"].tolist() for i in range(9)] != [w.tolist() for w in windows[:9]]
    assert data.passes(data.windows) == 1
    kept = data.ids[-2 * data.kept_back :]
    held = [torch.cat([b["input_ids"].flatten() for b in data.held_out(part)]) for part in ("validation", "test")]
    assert torch.cat(held).tolist() == [
        token for half in np.split(kept, 2) for token in half[: len(half) // 32 * 32].tolist()
    ]


def test_blind_loss_is_that_of_the_best_constant_answer(text):
    data = read_data({"text": str(text), "tokens": "characters", "length": 32}, text.parent)
    labels = torch.cat([batch["labels"].flatten() for batch in data.held_out("test")])
    logits = (labels.bincount(minlength=data.vocab_size).float() / len(labels)).log().expand(len(labels), -1)
    assert data.blind_loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_padding_and_masks(text):
    data = read_data({"text": str(text), "length": 32, "padding": 0.5, "masked": 0.2}, text.parent)
    batch = stack([data.example(0, index) for index in range(200)])
    real, asked = batch["attention_mask"].bool(), batch["labels"] != IGNORED
    lengths = real.sum(1)
    assert lengths.min() == 16
    assert lengths.max() == 32
    assert not (asked & ~real).any()
    assert (batch["input_ids"][asked] == data.vocab_size - 1).all()
    assert (batch["labels"][asked] < 256).all()
    assert asked.sum() / real.sum() == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("equal", ["parameters", "flops", "tokens"])
def test_equal_cost(equal):
    configs = {"gated": {"intermediate_size": 64}, "plain": {"ffn_type": "mlp", "num_attention_heads": 4}}
    if equal != "parameters":
        configs["plain"]["intermediate_size"] = 300
    base = {name: value for name, value in BASE.items() if name != "intermediate_size"}
    plan, folder = read_plan(plan_of(base=base, configs=configs, equal=equal, training={"steps": 90, "batch_size": 4}))
    gated, plain = arms(plan, read_plan_data(plan, folder))
    for arm in (gated, plain):
        model = hf_variants.VariantForCausalLM(arm.config)
        assert arm.parameters == sum(p.numel() for p in model.parameters())
    assert (abs(gated.parameters - plain.parameters) < 0.002 * gated.parameters) == (equal == "parameters")
    assert (gated.training.steps == plain.training.steps) == (equal != "flops")
    if equal == "flops":
        assert plain.flops == pytest.approx(gated.flops, rel=0.01)


def test_batches_are_the_same_for_every_config_and_hang_on_the_seed(tmp_path, monkeypatch):
    seen = {}

    def noting(examples):
        batch = stack(examples)
        seen.setdefault(current[0], []).append(batch["input_ids"])
        return batch

    current = [None]
    train_one = ablation.train_one

    def named(arm, data, settings):
        current[0] = (arm.name, settings.seed, settings.learning_rate, settings.shuffled)
        return train_one(arm, data, settings)

    monkeypatch.setattr(training_module, "stack", noting)
    monkeypatch.setattr(ablation, "train_one", named)
    ablate(PLAN, tmp_path / "out", progress=False, plots=False)
    runs = {key: torch.stack(batches) for key, batches in seen.items() if not key[3]}
    for (_, seed, _, _), batches in runs.items():
        assert batches.shape == (4, 4, 12)
        assert torch.equal(batches, runs[("rope", seed, *next(k for k in runs if k[:2] == ("rope", seed))[2:])])
    distinct = {batches.numpy().tobytes() for batches in runs.values()}
    # Two seeds of the plan and two of the noise floor.
    assert len(distinct) == 4


def test_a_plan_that_was_killed_goes_on(tmp_path, monkeypatch):
    results = ablate(PLAN, tmp_path / "whole", progress=False)
    lines = (tmp_path / "whole" / "results.jsonl").read_text().splitlines()
    # 2 configs x 2 seeds x 2 rates, the reference with 2 other seeds, and the control.
    assert len(lines) == 11
    (tmp_path / "cut").mkdir()
    # Killed while the fourth was written.
    (tmp_path / "cut" / "results.jsonl").write_text("\n".join([*lines[:3], lines[3][:100]]))
    made = []
    train_one = ablation.train_one
    monkeypatch.setattr(ablation, "train_one", lambda *a: made.append(a) or train_one(*a))
    again = ablate(PLAN, tmp_path / "cut", progress=False)
    assert len(made) == 8

    def losses(found):
        return [(each["config"], each["role"], each["seed"], each["test"], each["curve"]) for each in found.records]

    assert losses(again) == losses(results)
    # Another plan in the same folder keeps what it shares: here, everything but a new config.
    made.clear()
    more = {"rope": {}, "no": {"position_embedding_type": "none"}, "tied": {"tie_word_embeddings": True}}
    third = ablate(plan_of(configs=more), tmp_path / "cut", progress=False)
    assert {arm.name for arm, *_ in made} == {"tied"}
    assert {each["config"] for each in third.records} == set(more)


def test_what_is_written(tmp_path):
    results = ablate(plan_of(lengths=[2]), tmp_path / "out", progress=False)
    folder = tmp_path / "out"
    summary = json.loads((folder / "summary.json").read_text())
    drawings = {path.stem for path in (folder / "plots").iterdir()}
    assert drawings == {
        "loss", "sensitivity", "lengths", "gradients-before", "gradients-after", "max-logit", "log-z-squared",
    }  # fmt: skip
    for path in (folder / "plots").iterdir():
        ElementTree.parse(path)
        assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
    page = (folder / "README.md").read_text()
    assert all(f"(plots/{name}.svg)" in page for name in drawings)
    for name in ("rope", "none"):
        values = [
            each["test"]["loss"] for each in results.records
            if (each["config"], each["role"], each["learning_rate"]) == (name, "main", results.best_rate(name))
        ]  # fmt: skip
        assert summary["configs"][name]["metrics"]["loss"]["mean"] == pytest.approx(np.mean(values))
        assert f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}" in page
    entry = (folder / "log.md").read_text()
    ablate(plan_of(lengths=[2]), folder, progress=False, plots=False)
    # What was said once stays.
    assert (folder / "log.md").read_text().startswith(entry)
    assert (folder / "log.md").read_text().count("No difference shown") == 2


def test_a_control_that_does_not_fail_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("ab" * 4000)
    plan = plan_of(
        data={"text": "text.txt", "length": 16},
        seeds=2,
        learning_rates=[1e-2],
        training={"steps": 30, "batch_size": 4},
    )
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert hf_variants_cli.main(["ablate", str(path), "--no-plots"]) == 0
    summary = json.loads((tmp_path / "plan" / "summary.json").read_text())
    assert summary["control"]["losses"][0] >= summary["control"]["blind_loss"] == pytest.approx(math.log(2), abs=1e-3)
    monkeypatch.setattr(training_module, "Shuffle", lambda seed: stack)
    assert hf_variants_cli.main(["ablate", str(path), "--no-plots", "--output", str(tmp_path / "leaky")]) == 1
    assert "does not fail" in (tmp_path / "leaky" / "README.md").read_text()
    capsys.readouterr()


def test_probe_against_autograd_and_attention_written_out():
    torch.manual_seed(0)
    config = hf_variants.VariantConfig(**{**BASE, "num_hidden_layers": 2, "vocab_size": 16}, num_key_value_heads=1)
    model = hf_variants.VariantForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    data = read_data(RECALL, None)
    batch = data.held_out("validation")[0]
    before = model.config._attn_implementation
    found = probe(model, batch, 7)
    assert (model.config._attn_implementation, model.training, found.step) == (before, True, 7)
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = model(input_ids=batch["input_ids"]).logits
    cross_entropy(logits, batch["labels"], True)[0].backward()
    norms = [math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters())) for layer in model.model.layers]
    assert found.gradients == pytest.approx(norms, rel=1e-4)
    z = logits.double().exp().sum(-1).log()
    assert (found.log_z, found.log_z_squared) == pytest.approx((z.mean().item(), z.square().mean().item()), rel=1e-5)
    largest = -math.inf
    states = {}
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            layer.self_attn.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, key=(layer, name): states.__setitem__(key, output)
            )
    model(input_ids=batch["input_ids"])
    angles = torch.arange(12.0)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    # (length, head_dim)
    cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))
    for layer in model.model.layers:
        query, key = (states[layer, name].unflatten(-1, (-1, 16)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        turned = [x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (query, key)]
        scores = turned[0] @ turned[1].transpose(2, 3) / 4
        largest = max(largest, scores.masked_fill(~torch.ones(12, 12).tril().bool(), -math.inf).max().item())
    assert found.max_logit == pytest.approx(largest, rel=1e-4)


def test_score_is_the_mean_over_all_that_is_asked_for():
    config = hf_variants.VariantConfig(**BASE, vocab_size=16)
    model = hf_variants.VariantForCausalLM(config)
    batches = read_data(RECALL, None).held_out("test")
    found = score(model, batches)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    model.eval()
    logits = model(input_ids=whole["input_ids"]).logits[:, :-1]
    labels = whole["labels"][:, 1:]
    assert found["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5
    )
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels)[labels != IGNORED].float().mean().item())


def test_p_values():
    left, right = np.random.default_rng(0).normal(size=(2, 6))
    assert p_value(left - right, "paired-t") == pytest.approx(stats.ttest_rel(left, right).pvalue)
    assert p_value(left - right, "wilcoxon") == pytest.approx(stats.wilcoxon(left, right).pvalue)
    # All of five signs alike: 2 of 32 draws are as extreme.
    assert p_value(np.arange(1.0, 6.0), "permutation") == pytest.approx(2 / 32)
    assert p_value(np.zeros(4), "paired-t") == 1.0
    # https://en.wikipedia.org/wiki/Holm-Bonferroni_method, its example.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def records_of(losses, role="main", name="a"):
    return [
        {
            "config": name, "role": role, "seed": seed, "learning_rate": 1e-3, "initial_loss": 9.0, "steps": 1,
            "test": {"loss": loss, "accuracy": 0.0}, "validation": {"loss": loss},
        }
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


@pytest.mark.parametrize("test", ["paired-t", "permutation", "wilcoxon"])
def test_false_alarms_are_as_rare_as_said(test):
    """Of plans whose configs are all the same, 5 of 100 may name a difference."""
    random, alarms = np.random.default_rng(1), 0
    plan = Plan("", {"a": {}, "b": {}, "c": {}}, {}, reference="a", seeds=8, test=test)
    for _ in range(150):
        draws = random.normal(3.0, 0.1, size=(4, 8))
        records = [r for name, row in zip("abc", draws) for r in records_of(row, name=name)]
        results = Results(plan, [*records, *records_of(draws[3], "noise")])
        alarms += any(comparison.is_distinguished for comparison in results.comparisons())
    assert alarms <= 150 * 0.05 + 2 * math.sqrt(150 * 0.05 * 0.95)


def test_a_real_difference_is_named_and_one_within_the_noise_as_such():
    plan = Plan("", {"a": {}, "b": {}}, {}, reference="a", expect=({"less": "b", "than": "a"},))
    spread = np.linspace(-0.1, 0.1, 5)
    noise = records_of(3.0 - spread, "noise")
    for gap, outcome in (
        (0.5, "agrees"),
        (-0.5, "the opposite"),
        (0.01, "agrees, by less than seeds alone do"),
        (0.0, "not at this scale"),
    ):
        # Paired, every gap is beyond chance; only a large one is beyond what seeds do.
        results = Results(plan, [*records_of(3.0 + spread), *records_of(3.0 + spread * 1.01 - gap, name="b"), *noise])
        (comparison,) = results.comparisons()
        assert (comparison.p < 0.01) == bool(gap)
        assert comparison.outcome == outcome


def test_a_run_that_diverged_counts_as_untrained():
    plan = Plan("", {"a": {}, "b": {}}, {}, reference="a", learning_rates=(1e-3,))
    results = Results(plan, [*records_of([2.0, 2.1]), *records_of([math.nan, 50.0], name="b")])
    assert results.values("b").tolist() == [9.0, 9.0]
    assert results.values("b", "sensitivity").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sedes": 3}, "`seeds`"),
        ({"seeds": 1}, "`seeds`"),
        ({"equal": "time"}, "`equal`"),
        ({"test": "z"}, "`test`"),
        ({"reference": "x"}, "`reference`"),
        ({"learning_rates": ["1e-3"]}, "`learning_rates`"),
        ({"training": {"step": 3}}, "`steps`"),
        ({"training": {"steps": -3}}, "`steps`"),
        ({"training": {"schedule": "sine"}}, "`schedule`"),
        ({"configs": {"a": {"training": {"batch_size": 3}}}}, "`batch_size`"),
        ({"configs": ["a"]}, "`configs`"),
        ({"configs": {"a": {"norm_placment": "pre"}}}, "norm_placement"),
        ({"configs": {"a": {}, "b": {"intermediate_size": 8}}, "equal": "parameters"}, "`intermediate_size`"),
        ({"configs": {"a": {}, "b": {"vocab_size": 9000}}, "equal": "parameters"}, "No inner width"),
        ({"configs": {"a": {"is_causal": False}}}, "is_causal=False"),
        ({"configs": {"a": {"vocab_size": 3}}}, "`vocab_size`"),
        ({"configs": {"a": {"shift_labels": False}}}, "`shift_labels`"),
        ({"expect": [{"less": "x", "than": "rope"}]}, "`expect`"),
        ({"expect": [{"less": "none", "than": "rope", "metric": "loss@64"}]}, "`lengths`"),
        ({"data": {"task": "sorting"}}, "`data.task`"),
        ({"data": {"task": "recall", "pair": 3}}, "`data.pair`"),
        ({"data": {"task": "recall", "pairs": 9, "keys": 8}}, "`data.pairs`"),
        ({"data": {"task": "copy", "padding": 1.0}}, "`data.padding`"),
        ({"data": {"task": "copy", "text": "x"}}, "several"),
        ({"data": {"text": "text.txt", "length": 9000}}, "`data.length`"),
        ({"data": {"text": "text.txt", "size": 9}}, "`data.size`"),
    ],
)
def test_refusals_name_the_setting(changes, word, text):
    # A plan's paths start from its folder.
    path = text.parent / "plan.json"
    path.write_text(json.dumps(plan_of(**changes)))
    with pytest.raises(ValueError, match=word.replace("(", r"\(")):
        ablate(path, text.parent / "out", progress=False)
    assert not (text.parent / "out").exists()


def test_plans_in_yaml_and_toml_are_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "title: T\ndata: {task: copy}\nconfigs: {a: {}, b: {norm_placement: post}}\nlearning_rates: [1.0e-3]\n"
    )
    (tmp_path / "a.toml").write_text(
        'title = "T"\nlearning_rates = [1e-3]\n[data]\ntask = "copy"\n[configs.a]\n[configs.b]\nnorm_placement = "post"\n'
    )
    assert read_plan(tmp_path / "a.yaml")[0] == read_plan(tmp_path / "a.toml")[0]
    (tmp_path / "b.yaml").write_text("title: [")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "b.yaml")


def test_encoders_are_trained_on_masked_tokens(tmp_path):
    plan = plan_of(
        base={**BASE, "is_causal": False}, data={"task": "copy", "masked": 0.2, "padding": 0.3}, learning_rates=[1e-3]
    )
    results = ablate(plan, tmp_path / "out", progress=False, plots=False)
    assert all(math.isfinite(each["test"]["loss"]) for each in results.records)


def test_charts():
    lines = [Series("a < b", [(1, 2.0), (10, math.nan), (100, 3.0)]), Series("c", [(1, 0.0), (5, 1e-3)])]
    drawing = ElementTree.fromstring(line_chart("T & U", lines, "x", "y", log_x=True, log_y=True))
    space = "{http://www.w3.org/2000/svg}"
    polylines = drawing.findall(f"{space}polyline")
    # What is no number, or not above 0 on a logarithmic axis, is left out.
    assert [len(each.get("points").split()) for each in polylines] == [2, 1]
    assert {"T & U", "a < b", "c", "x", "y"} <= {each.text for each in drawing.iter(f"{space}text")}
    first = [tuple(map(float, point.split(","))) for point in polylines[0].get("points").split()]
    assert all(left[0] < right[0] and left[1] > right[1] for left, right in pairwise(first))
    bars = ElementTree.fromstring(bar_chart("B", {"m": {"p": 3.0, "q": 1.0}, "n": {"p": 2.0}}, "size"))
    widths = [
        float(each.get("width")) for each in bars.findall(f"{space}rect") if each.find(f"{space}title") is not None
    ]
    assert widths == pytest.approx([3 * widths[1], widths[1], 2 * widths[1]], rel=0.01)
    ElementTree.fromstring(line_chart("empty", [], "x", "y"))
