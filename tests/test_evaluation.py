"""Results of the lm-evaluation-harness on a card: what is taken, from which file, and what is refused."""

import copy
import json

import pytest
from huggingface_hub import EvalResult, ModelCard

import hf_variants_cli
from hf_variants import VariantConfig, VariantForCausalLM
from hf_variants.card import CARD, evaluation_results, write_card
from hf_variants.evaluation import HARNESS, read_results
from tests.test_custom_code import SIZES


def task(name, **config):
    return {
        "task": name,
        "dataset_path": "allenai/ai2_arc",
        "dataset_name": "ARC-Easy",
        "test_split": "test",
        **config,
    }


# In the form of its release 0.4.13; tests/tools/test_evaluation.py runs it.
REPORT = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "sample_len": 6, "acc,none": 0.5, "acc_stderr,none": 0.2,
                     "acc_norm,none": 0.25, "acc_norm_stderr,none": "N/A"},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.125, "exact_match,flexible-extract": 0.25},
        "zoo": {"alias": "The Zoo", "acc,none": 0.75, "sample_count": {"acc,none": 12}},
        "zoo_a": {"alias": " - zoo_a", "acc,none": 0.5},
        "zoo_b": {"alias": " - zoo_b", "acc,none": 1.0},
        "heading": {"alias": "heading", " ": " "},
        "loose": {"alias": " - loose", "bleu,none": 12.0},
        "writes": {"alias": "writes", "bypass,none": 999},
        "broken": {"alias": "broken", "acc,none": float("nan")},
    },
    "group_subtasks": {"zoo": ["zoo_a", "zoo_b"], "heading": ["loose"], "arc_easy": []},
    "configs": {
        "arc_easy": task("arc_easy", dataset_kwargs={"revision": "abc"}),
        "gsm8k": task("gsm8k", dataset_path="gsm8k", dataset_name="main", test_split=None, validation_split="val"),
        "zoo_a": task("zoo_a", dataset_name="a", dataset_path="our/zoo"),
        "zoo_b": task("zoo_b", dataset_name="b", dataset_path="our/zoo"),
        "loose": task("loose", dataset_path="json", dataset_name=None, dataset_kwargs={"data_files": "rows.jsonl"}),
        "writes": task("writes"), "broken": task("broken"),
    },
    "n-shot": {"arc_easy": 0, "gsm8k": 5, "zoo": 3, "loose": 0},
    "config": {"model": "hf", "limit": None},
    "date": 2.0, "lm_eval_version": "0.4.13", "model_name": "someone/else",
}  # fmt: skip
SHARED = {
    "task_type": "text-generation", "source_name": "lm-evaluation-harness 0.4.13", "source_url": HARNESS,
}  # fmt: skip


def expected(name, metric, value, dataset_type, **more):
    return EvalResult(
        **SHARED, dataset_name=name, dataset_type=dataset_type, metric_type=metric,
        **{"metric_name": metric, "task_name": name, "dataset_split": "test", **more}, metric_value=value,
    )  # fmt: skip


ARC = {"dataset_config": "ARC-Easy", "dataset_revision": "abc", "dataset_args": {"num_few_shot": 0}}
GSM = {"dataset_config": "main", "dataset_split": "val", "dataset_args": {"num_few_shot": 5}}
RESULTS = [
    expected("arc_easy", "acc", 0.5, "allenai/ai2_arc", **ARC),
    expected("arc_easy", "acc_norm", 0.25, "allenai/ai2_arc", **ARC),
    expected("gsm8k", "exact_match", 0.125, "gsm8k", metric_name="exact_match, strict-match", **GSM),
    expected("gsm8k", "exact_match", 0.25, "gsm8k", metric_name="exact_match, flexible-extract", **GSM),
    expected("zoo", "acc", 0.75, "our/zoo", task_name="The Zoo", dataset_args={"num_few_shot": 3}),
    expected("loose", "bleu", 12.0, "loose", dataset_args={"num_few_shot": 0}),
]


def written(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**REPORT, **changes}), encoding="utf-8")
    return path


def test_every_metric_with_its_dataset(tmp_path):
    assert read_results([written(tmp_path / "results_1.json")], "text-generation") == RESULTS


def test_the_last_of_several_files_counts(tmp_path):
    written(tmp_path / "b" / "results_1.json", results={"arc_easy": {"acc,none": 0.1}}, date=1.0)
    written(tmp_path / "a" / "results_2.json", results={"gsm8k": {"acc,none": 0.9}}, date=3.0)
    newer = written(tmp_path / "c.json")
    found = read_results([newer, tmp_path], "text-generation")
    values = {(result.dataset_name, result.metric_type): result.metric_value for result in found}
    assert values["arc_easy", "acc"] == 0.5
    assert {metric: value for (name, metric), value in values.items() if name == "gsm8k"} == {"acc": 0.9}


def test_the_command_puts_them_on_the_card(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SIZES))
    model.save_pretrained(tmp_path / "model")
    size = {"config": {"limit": None, "model_num_parameters": model.num_parameters()}}
    path = written(tmp_path / "out" / "model" / "results_1.json", **size)
    assert hf_variants_cli.main(["card", str(tmp_path / "model"), "--eval-results", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "model" / CARD)
    # On cards the metrics of a dataset stand together.
    assert sorted(card.data.eval_results, key=repr) == sorted(RESULTS, key=repr)
    assert card.data.metrics == ["acc", "acc_norm", "bleu", "exact_match"]
    assert "| The Zoo | zoo (test) | acc | 0.75 |" in card.text
    # They stay when the model is saved again, and under a task that was given are of that task.
    write_card(tmp_path / "model", pipeline_tag="translation")
    assert len(ModelCard.load(tmp_path / "model" / CARD).data.eval_results) == len(RESULTS)
    assert {result.task_type for result in evaluation_results(tmp_path / "model", [path])} == {"translation"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"limit": 10.0}}, r"a part of the examples \(`limit` is 10.0\)"),
        ({"config": {"model_num_parameters": 7}}, "someone/else with 7 parameters, and this model has 8"),
        ({"results": {"arc_easy": {"alias": "arc_easy"}}}, "has no metric"),
        ({"results": None}, "no file of the lm-evaluation-harness"),
    ],
)
def test_what_does_not_speak_of_this_model_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_results([written(tmp_path / "results_1.json", **copy.deepcopy(changes))], "text-generation", parameters=8)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "results_1.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON"):
        read_results([tmp_path], "text-generation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no results_"):
        read_results([tmp_path / "empty"], "text-generation")
