"""What the lm-evaluation-harness found, as the evaluation results of a model card (the Hub's `model-index`)."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult


HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
# Builders of `datasets` that read files, which are no name of a dataset.
OF_FILES = ("arrow", "csv", "json", "pandas", "parquet", "text")


def read_results(paths: Iterable[str | Path], task_type: str, parameters: int | None = None) -> list[EvalResult]:
    """
    Every metric of every task that the harness's files hold; of a group that has metrics, those of the group alone.

    Standard errors stay in the files. Of a task that several files have, the file counts that was written last.

    Args:
        paths: of `results_*.json`, as `lm-eval --output_path` writes them, or of folders that hold such.
        task_type: the Hub's name of the model's task, such as `"text-generation"`.
        parameters: of the model that the results are to be of; a file on one of another size is refused.

    Returns:
        results by task and metric, with the dataset, its split and the number of shots; values as the harness has them.

    Raises:
        OSError: if there is no such file; ValueError: if a file is none of the harness, speaks of another model or of a
            part of the examples (`--limit`), or has no metric.
    """
    found: dict[str, list[EvalResult]] = {}
    reports = [(path, _report(path, parameters)) for path in _files(paths)]
    for path, report in sorted(reports, key=lambda each: each[1].get("date") or 0):
        of_file = _tasks(report, task_type)
        if not of_file:
            raise ValueError(f"{path} has no metric. Check that the evaluation came to its end.")
        found |= of_file
    return [result for results in found.values() for result in results]


def _files(paths: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("results_*.json")) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"{path} holds no results_*.json. Name what `lm-eval --output_path` wrote.")
        files += inside
    return files


def _report(path: Path, parameters: int | None) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Name what `lm-eval --output_path` wrote.") from None
    if not isinstance(report, dict) or not all(
        isinstance(report.get(key), dict) for key in ("results", "configs", "config")
    ):
        raise ValueError(
            f"{path} is no file of the lm-evaluation-harness, which has `results`, `configs` and `config`. Name what "
            "`lm-eval --output_path` wrote."
        )
    if (limit := report["config"].get("limit")) is not None:
        raise ValueError(
            f"{path} speaks of a part of the examples (`limit` is {limit}). Evaluate without `--limit` for a card."
        )
    evaluated = report["config"].get("model_num_parameters")
    if parameters is not None and isinstance(evaluated, int) and evaluated not in (parameters, 0, -1):
        raise ValueError(
            f"{path} speaks of {report.get('model_name', 'a model')} with {evaluated:,} parameters, and this model has "
            f"{parameters:,}. Name the results of this model."
        )
    return report


def _tasks(report: Mapping[str, Any], task_type: str) -> dict[str, list[EvalResult]]:
    """By the name of a task or group."""
    metrics = {name: list(_metrics(values)) for name, values in report["results"].items()}
    groups = report.get("group_subtasks", {})
    # A group without a metric of its own is a heading.
    inside = {below for name, values in metrics.items() if values for below in _below(name, groups)}
    found = {}
    for name, values in metrics.items():
        if not values or name in inside:
            continue
        dataset = _dataset(report, name, groups)
        found[name] = [
            EvalResult(
                task_type=task_type,
                task_name=report["results"][name].get("alias", name).lstrip(" -"),
                metric_type=metric,
                metric_name=metric if chosen == "none" else f"{metric}, {chosen}",
                metric_value=value,
                source_name=f"lm-evaluation-harness {report.get('lm_eval_version', '')}".rstrip(),
                source_url=HARNESS,
                **dataset,
            )
            for metric, chosen, value in values
        ]
    return found


def _metrics(values: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Of `metric,filter`: what is measured, the filter that took it from the answers, and the number."""
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        # `bypass` measures nothing: such a task only writes answers.
        if comma and is_number and not metric.endswith("_stderr") and metric != "bypass":
            yield metric, chosen, value


def _dataset(report: Mapping[str, Any], name: str, groups: Mapping[str, list[str]]) -> dict[str, Any]:
    """What was read, of which split, with how many examples in the prompt; of a group, what all its tasks share."""
    configs = [report["configs"][task] for task in (name, *_below(name, groups)) if task in report["configs"]]

    def shared(*keys: str) -> Any:
        values = [next((config[key] for key in keys if config.get(key) is not None), None) for config in configs]
        return values[0] if values and all(value == values[0] for value in values) else None

    path = shared("dataset_path")
    is_named = isinstance(path, str) and path not in OF_FILES and not Path(path).is_absolute()
    shots = report.get("n-shot", {}).get(name, shared("num_fewshot"))
    options = shared("dataset_kwargs")
    return {
        "dataset_type": path if is_named else name,
        "dataset_name": name,
        "dataset_config": shared("dataset_name"),
        "dataset_split": shared("test_split", "validation_split", "training_split"),
        "dataset_revision": options.get("revision") if isinstance(options, dict) else None,
        "dataset_args": None if shots is None else {"num_few_shot": shots},
    }


def _below(name: str, groups: Mapping[str, list[str]]) -> Iterable[str]:
    """The groups and tasks of a group; none of a task, which some releases list as a group of nothing."""
    for task in groups.get(name, ()):
        yield task
        yield from _below(task, groups)
