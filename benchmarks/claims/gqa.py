"""Claim 9: heads of keys and values are pooled by their mean, taken from the first of a group, or drawn, and uptrained."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_variants.ablate import NOISE_SEEDS, Results
from hf_variants.ablate.data import Data
from hf_variants.ablate.plan import Arm, Plan
from hf_variants.ablate.probes import score
from hf_variants.ablate.train import Settings, train_model
from hf_variants.cost.parameters import count_parameters, structure
from hf_variants.surgery import KeyValueHeads
from hf_variants.surgery.edit import edit_model


HEADS = 1
KINDS = ("mean", "first", "drawn")
# Of the first training, as in the paper.
UPTRAINED = 0.05


def converted(model: Any, kind: str, seed: int) -> Any:
    """The model with fewer heads of keys and values."""
    made = edit_model(model, [KeyValueHeads(HEADS)])
    if kind == "mean":
        return made
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for old, new in zip(model.model.layers, made.model.layers, strict=True):
            for name in ("k_proj", "v_proj"):
                before, after = (layer.self_attn.get_submodule(name).weight for layer in (old, new))
                # (kv heads, head_dim, hidden) -> the first of every group
                groups = before.unflatten(0, (HEADS, -1, old.self_attn.head_dim))
                if kind == "first":
                    after.copy_(groups[:, 0].flatten(0, 1))
                else:
                    after.normal_(std=before.std().item(), generator=generator)
    return made


def run(plan: Plan, arm: Arm, data: Data, output: Path) -> tuple[list[dict[str, Any]], list[Arm]]:
    """
    All runs, those that are in the folder already kept.

    Args:
        plan: whose one config is trained first.
        arm: that config.

    Returns:
        records and arms as `hf_variants.ablate` makes them: `mha`, and for every kind what it is before and after.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "gqa.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    short = replace(arm.training, steps=round(UPTRAINED * arm.training.steps), warmup=0)
    none = replace(arm.training, steps=0)
    fewer = copy.deepcopy(arm.config)
    fewer.update({"num_key_value_heads": HEADS})
    count = count_parameters(structure(fewer)).total
    share = UPTRAINED * arm.flops
    arms = [arm, replace(arm, name="mha, trained on", training=short, flops=round(share))]
    for kind in KINDS:
        arms.append(Arm(f"{kind}, converted", fewer, none, count, 0))
        arms.append(Arm(f"{kind}, uptrained", fewer, short, count, round(share)))
    (rate,) = plan.learning_rates
    for seed, role in _seeds(plan):
        wanted = {each.name for each in arms} if role == "main" else {arm.name}
        if {each["config"] for each in kept if each["seed"] == seed} == wanted:
            continue
        kept = [each for each in kept if each["seed"] != seed]
        torch.manual_seed(seed)
        model = structure(arm.config).cls(copy.deepcopy(arm.config))
        made = [(arm, train_model(model, arm.training, data, Settings(seed, rate)))]
        if role == "main":
            made += _conversions(arms, model, data, seed, rate / 3)
        for each, found in made:
            kept.append(
                {"config": each.name, "role": role, "seed": seed, "learning_rate": rate, "steps": each.training.steps,
                 "parameters": each.parameters, "flops": each.flops, "seconds": 0.0, **found}
            )  # fmt: skip
        path.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")
    # How a converted model begins is what is looked at, not a divergence.
    return [{**each, "initial_loss": max(each["initial_loss"], 1e3)} for each in kept], arms


def _seeds(plan: Plan) -> list[tuple[int, str]]:
    """Each with its role: of the claim, or of the noise floor, for which the model is trained and not converted."""
    main = [(seed, "main") for seed in range(plan.seeds)]
    return main + [(NOISE_SEEDS + seed, "noise") for seed in range(plan.seeds if plan.noise else 0)]


def _conversions(arms: list[Arm], model: Any, data: Data, seed: int, rate: float) -> list[tuple[Arm, dict[str, Any]]]:
    """
    What becomes of a trained model: trained on, and converted in each way, before and after it is trained on.

    Args:
        arms: as `run` returns them.
        rate: lower than before, where the schedule had come to its end.
    """
    # Other batches than before.
    later = Settings(seed + 500, rate)
    made = [(arms[1], train_model(copy.deepcopy(model), arms[1].training, data, later))]
    for kind, before, after in zip(KINDS, arms[2::2], arms[3::2], strict=True):
        student = converted(model, kind, seed)
        # Of a model that is not trained, the runner looks at a part of the data alone.
        whole = {part: score(student, data.held_out(part)) for part in ("test", "validation")}
        made.append((before, {**train_model(student, before.training, data, later), **whole}))
        made.append((after, train_model(student, after.training, data, later)))
    return made


def recovery(results: Results) -> str:
    """How much of what the conversion cost came back."""
    means = {name: results.values(name).mean() for name in results.plan.configs}
    found = []
    for kind in KINDS:
        before, after = means[f"{kind}, converted"], means[f"{kind}, uptrained"]
        found.append(f"{kind} {(before - after) / (before - means['mha']):.0%}")
    return (
        f"{UPTRAINED:.0%} of the steps give back, of what the conversion to {HEADS} head of keys and values cost: "
        f"{', '.join(found)}."
    )
