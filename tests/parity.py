"""The native comparison: what must hold between a stock model and ours for every config of every family.

Equality is exact in float32 and bfloat16, eager and sdpa. Where a family lists a deviation, the float32 logits may
differ by its bound relative to their standard deviation, and the bfloat16 error against float32 may at most double.
"""

import json
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_variants
from hf_variants.conversion import rules
from hf_variants.conversion.family import family_of


@dataclass(frozen=True)
class Row:
    """
    One native type in the comparison.

    Attributes:
        model_type: as in transformers.
        draw: a random choice of the type's options -> keyword arguments of its config class, tiny sizes included.
        length: of the long input; larger than every window and original context that `draw` gives.
        seeds: configs to try.
        backends: attention implementations that the native class has.
        generates: compare generation (a base model or a class without a cache cannot).
    """

    model_type: str
    draw: Callable[[random.Random], dict[str, Any]]
    length: int = 40
    seeds: int = 4
    backends: tuple[str, ...] = ("eager", "sdpa")
    generates: bool = True


def hostile_(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """
    Weights that forgive nothing: norm weights far from 1, biases far from 0, all of them distinct, and attention
    scores with a spread; activations stay finite. Persistent buffers count as weights.
    """
    generator = torch.Generator().manual_seed(seed)
    persistent = set(model.state_dict())
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                is_table = "embed" in name or "wte" in name or "wpe" in name
                scale = 1.0 if is_table else 1.6 / math.sqrt(tensor.shape[-1])
                tensor.copy_(noise * scale)
            elif "norm" in name.lower() or "ln_" in name or name.endswith(".weight"):
                # Both signs of 1 + w, far from the identity, each channel its own.
                tensor.copy_(0.9 + 0.8 * noise if name.endswith("weight") else 0.7 * noise)
            else:
                tensor.copy_(0.6 * noise)
    model.tie_weights()
    return model


def random_native(row: Row, seed: int) -> PreTrainedModel:
    """A stock model with a random config and hostile weights."""
    rng = random.Random(f"{row.model_type}-{seed}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[row.model_type](**row.draw(rng))
        torch.manual_seed(seed)
        model = family_of(row.model_type).native_class("causal_lm")(config)
    return hostile_(model, seed).eval()


def padded_inputs(vocab_size: int, length: int, pad_token_id: int | None) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs by name: a long one without padding, one padded right, one padded left as `generate` does it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (2, length), generator=generator)
    if pad_token_id is not None:
        ids[ids == pad_token_id] = (pad_token_id + 1) % vocab_size
    short = ids[:, : length // 2]
    right, left = torch.ones_like(short), torch.ones_like(short)
    right[1, short.shape[1] // 2 :] = 0
    left[1, : short.shape[1] // 3] = 0
    positions = (left.cumsum(-1) - 1).clamp(min=0)
    return {
        "long": {"input_ids": ids},
        "right padding": {"input_ids": short, "attention_mask": right},
        "left padding": {"input_ids": short, "attention_mask": left, "position_ids": positions},
    }


def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the real tokens only: (tokens, vocab_size), or (batch, length, vocab_size) without padding."""
    with torch.no_grad():
        logits = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits[mask.bool()]


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference relative to the reference's standard deviation."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().std()).item()


def check_logits(native: PreTrainedModel, ours: PreTrainedModel, row: Row, bound: float) -> list[str]:
    """Compare logits in both dtypes and all backends; returns what differs."""
    failures = []
    exact: dict[str, torch.Tensor] = {}
    inputs = padded_inputs(native.config.vocab_size, row.length, native.config.pad_token_id)
    for dtype in (torch.float32, torch.bfloat16):
        native, ours = native.to(dtype), ours.to(dtype)
        for backend in row.backends:
            if backend == "sdpa" and not ours._supports_sdpa:
                continue
            native.set_attn_implementation(backend)
            ours.set_attn_implementation(backend)
            for name, batch in inputs.items():
                reference, made = logits_of(native, batch), logits_of(ours, batch)
                assert torch.isfinite(reference).all(), "hostile weights overflow the native model itself"
                if dtype is torch.float32:
                    exact.setdefault(name, reference)
                if torch.equal(reference, made):
                    continue
                error = relative_error(made, reference)
                if bound and dtype is torch.float32 and error <= bound:
                    continue
                if bound and dtype is torch.bfloat16:
                    truth = exact[name]
                    if relative_error(made, truth) <= 2 * relative_error(reference, truth):
                        continue
                failures.append(f"{name}, {dtype}, {backend}: relative error {error:.2e}")
    return failures


def upcast_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Put the float32 weights back after a comparison in bfloat16."""
    model.float()
    model.load_state_dict(weights)


def check_gradients(native: PreTrainedModel, ours: PreTrainedModel, bound: float) -> list[str]:
    """Gradients of the language-modelling loss, carried to native names by the family's own rules."""
    batch = padded_inputs(native.config.vocab_size, 16, native.config.pad_token_id)["long"]["input_ids"]
    for model in (native, ours):
        model.set_attn_implementation("eager")
        model.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    family = family_of(native.config.model_type)
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (native, ours)]
    theirs, own = gradients
    shapes = {name: gradient.shape for name, gradient in theirs.items()}
    steps = rules.plan(family.rules_for("causal_lm"), list(own), shapes, to_native=True)
    made = dict(rules.run(steps, own.__getitem__, ours.config, shapes, to_native=True))
    # A gradient's own spread can vanish (a key bias under softmax), so errors are taken against the largest one.
    scale = max(gradient.std().item() for gradient in theirs.values() if gradient.numel() > 1)
    failures = []
    for name, gradient in theirs.items():
        error = (made[name] - gradient).abs().max().item() / scale
        if not torch.equal(made[name], gradient) and not (bound and error <= bound):
            failures.append(f"gradient of {name}: error {error:.2e} of the largest spread")
    return failures


def check_generation(native: PreTrainedModel, ours: PreTrainedModel, row: Row) -> list[str]:
    """Greedy and beam-search tokens with the cache, from a left-padded batch."""
    inputs = padded_inputs(native.config.vocab_size, 2 * 10, native.config.pad_token_id)["left padding"]
    failures = []
    for beams in (1, 3):
        tokens = [
            model.generate(
                inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, num_beams=beams,
                max_new_tokens=12, min_new_tokens=12, pad_token_id=0, eos_token_id=None,
            )
            for model in (native, ours)
        ]  # fmt: skip
        if not torch.equal(*tokens):
            failures.append(f"tokens with {beams} beams")
    return failures


def check_round_trip(native: PreTrainedModel, ours: PreTrainedModel) -> list[str]:
    """The export: every tensor and buffer bit-equal, and the config that the stock class itself would write."""
    restored = hf_variants.to_native(ours, native.config.model_type)
    failures = []
    if type(restored) is not type(native):
        failures.append(f"export is a {type(restored).__name__}")
    before, after = native.state_dict(), restored.state_dict()
    if before.keys() != after.keys():
        failures.append(f"names differ: {sorted(before.keys() ^ after.keys())[:4]}")
    failures += [f"tensor {name}" for name in before if name in after and not torch.equal(before[name], after[name])]
    expected, got = (json.loads(model.config.to_json_string()) for model in (native, restored))
    for volatile in ("dtype", "architectures", "transformers_version", "_name_or_path"):
        expected.pop(volatile, None)
        got.pop(volatile, None)
    failures += [
        f"config key {key}: {expected.get(key)!r} became {got.get(key)!r}"
        for key in expected.keys() | got.keys()
        if expected.get(key) != got.get(key)
    ]
    return failures


def check_config_bijection(native: PreTrainedModel, ours: PreTrainedModel) -> list[str]:
    """native -> ours -> native -> ours gives the same variant, also from the JSON of both."""
    config_map = family_of(native.config.model_type).config_map
    again = config_map.to_variant(config_map.to_native(ours.config))
    reloaded = hf_variants.VariantConfig(**json.loads(ours.config.to_json_string(use_diff=False)))
    first, second, third = (json.loads(c.to_json_string(use_diff=False)) for c in (ours.config, again, reloaded))
    ignored = ("dtype", "architectures", "_name_or_path")
    failures = []
    for key in first:
        if key in ignored:
            continue
        if first[key] != second.get(key):
            failures.append(f"config field {key}: {first[key]!r} became {second.get(key)!r}")
        if first[key] != third.get(key):
            failures.append(f"config field {key} lost in JSON: {first[key]!r} became {third.get(key)!r}")
    return failures


def check_row(row: Row, seed: int) -> list[str]:
    """Everything that must hold for one random config of a native type."""
    native = random_native(row, seed)
    ours = hf_variants.from_native(native)
    family = family_of(row.model_type)
    deviations = family.deviations_of(ours.config)
    bound = max((deviation.bound for deviation in deviations), default=0.0)
    weights = [{k: v.clone() for k, v in model.state_dict().items()} for model in (native, ours)]
    assert ours.num_parameters() == native.num_parameters()
    failures = check_round_trip(native, ours) + check_config_bijection(native, ours)
    failures += check_logits(native, ours, row, bound)
    for model, saved in zip((native, ours), weights):
        upcast_weights(model, saved)
    failures += check_gradients(native, ours, bound)
    if row.generates:
        failures += check_generation(native, ours, row)
    return failures
