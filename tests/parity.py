"""The native comparison: what must hold between a stock model and ours for every config of every family.

Equality is exact in float32 and bfloat16, eager and sdpa. Where a family lists a deviation, the float32 logits may
differ by its bound relative to their standard deviation, and the bfloat16 error against float32 may at most double.
"""

import inspect
import json
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

import hf_variants
from hf_variants.conversion import rules
from hf_variants.conversion.family import family_of
from hf_variants.conversion.skeleton import stored_tensors
from hf_variants.conversion.verification import set_attention


@dataclass(frozen=True)
class Row:
    """
    One native type in the comparison.

    Attributes:
        model_type: as in transformers.
        draw: a random choice of the type's options -> keyword arguments of its config class, tiny sizes included.
        length: of the long input; larger than every window and original context that `draw` gives.
        seeds: configs to try.
        backends: attention implementations of the native class that are compared, or a function of its config.
        generates: compare generation (a base model or a class without a cache cannot).
        heads: other heads of the type whose outputs and export are compared as well.
        reference: the class to compare with, of a type that transformers does not have.
    """

    model_type: str
    draw: Callable[[random.Random], dict[str, Any]]
    length: int = 40
    seeds: int = 4
    backends: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ("eager", "sdpa")
    generates: bool = True
    heads: tuple[str, ...] = ()
    reference: type[PreTrainedModel] | None = None


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


def random_native(row: Row, seed: int, head: str = "") -> PreTrainedModel:
    """A stock model with a random config and hostile weights; by default with the type's usual head."""
    rng = random.Random(f"{row.model_type}-{seed}")
    family = family_of(row.model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = family.config_map.native_class(**row.draw(rng))
        torch.manual_seed(seed)
        model = (row.reference or family.native_class(head or family.primary))(config)
    return hostile_(model, seed).eval()


def inputs_of(model: PreTrainedModel, length: int) -> dict[str, dict[str, torch.Tensor]]:
    """`padded_inputs` for any kind of model: decoder inputs for an encoder-decoder, token types where there are any."""
    config = model.config
    inputs = padded_inputs(config.vocab_size, length, config.pad_token_id)
    generator = torch.Generator().manual_seed(2)
    for batch in inputs.values():
        shape = batch["input_ids"].shape
        if config.is_encoder_decoder:
            # Their encoders know no position ids; the decoder's side is not padded.
            batch.pop("position_ids", None)
            vocab_size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
            # Their classifiers look for the end of a sequence in the source, among the decoder's positions.
            classifies = "SequenceClassification" in type(model).__name__
            decoder_shape = (2, shape[1] if classifies else max(shape[1] * 3 // 4, 2))
            batch["decoder_input_ids"] = torch.randint(0, vocab_size, decoder_shape, generator=generator)
            if classifies and isinstance(end := config.eos_token_id, int):
                ids = batch["input_ids"].masked_fill(batch["input_ids"] == end, (end + 1) % config.vocab_size)
                ids[:, shape[1] // 2] = end
                batch["input_ids"] = ids
        elif "position_ids" not in inspect.signature(model.forward).parameters:
            # BART's decoder passes over them.
            batch.pop("position_ids", None)
        elif "MaskedLM" in type(model).__name__ or "For" not in type(model).__name__ or not model.can_generate():
            batch.pop("position_ids", None)
            if getattr(config, "type_vocab_size", 0) > 1:
                batch["token_type_ids"] = torch.randint(0, config.type_vocab_size, shape, generator=generator)
            if getattr(config, "use_task_id", False):
                batch["task_type_ids"] = torch.randint(0, config.task_type_vocab_size, shape, generator=generator)
        if "SequenceClassification" in type(model).__name__ and config.pad_token_id is None:
            # Without a padding token most native classes take one sequence at a time.
            batch.update({name: tensor[:1] for name, tensor in batch.items()})
        elif "SequenceClassification" in type(model).__name__ and "attention_mask" in batch:
            # Most find the last token by its id, and not by the mask.
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, config.pad_token_id)
    return inputs


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
    """
    Logits of the real tokens only: (tokens, vocab_size), or (batch, length, vocab_size) without padding. Of a model
    that does not give logits per token, all that it gives, flattened.
    """
    with torch.no_grad():
        outputs = model(**inputs)
    mask = inputs.get("attention_mask")
    if "start_logits" in outputs:
        made = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    else:
        made = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    if mask is not None and made.ndim == 3 and made.shape[1] == mask.shape[1] and "decoder_input_ids" not in inputs:
        made = made[mask.bool()]
    pooled = outputs.get("pooler_output")
    return made if pooled is None else torch.cat([made.flatten(), pooled.flatten()])


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference relative to the reference's standard deviation."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().std()).item()


def set_backend(native: PreTrainedModel, ours: PreTrainedModel, backend: str) -> None:
    """Both models with this attention, also a native class that cannot switch but reads its config (Falcon)."""
    set_attention(native, backend)
    native.config._attn_implementation_internal = backend
    set_attention(ours, backend)


def check_logits(native: PreTrainedModel, ours: PreTrainedModel, row: Row, bound: float) -> list[str]:
    """Compare logits in both dtypes and all backends; returns what differs."""
    failures = []
    exact: dict[str, torch.Tensor] = {}
    inputs = inputs_of(native, row.length)
    for dtype in (torch.float32, torch.bfloat16):
        native, ours = native.to(dtype), ours.to(dtype)
        for backend in row.backends if isinstance(row.backends, tuple) else row.backends(native.config):
            if backend == "sdpa" and not ours._supports_sdpa:
                continue
            set_backend(native, ours, backend)
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


def as_choices(head: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as a head takes it: for multiple choice, its rows are the choices of one question."""
    if head != "multiple_choice":
        return batch
    # ModernBERT's stock class wants a mask, and ERNIE's leaves task types in another shape than the rest.
    batch = {"attention_mask": torch.ones_like(batch["input_ids"])} | batch
    return {name: tensor.unsqueeze(0) for name, tensor in batch.items() if name != "task_type_ids"}


def check_gradients(
    native: PreTrainedModel, ours: PreTrainedModel, bound: float, head: str = "", batch: dict | None = None
) -> list[str]:
    """Gradients of the loss (by default a language model's), carried to native names by the family's own rules."""
    if batch is None:
        batch = inputs_of(native, 16)["long"]
        batch["labels"] = batch.get("decoder_input_ids", batch["input_ids"])
    arguments = {"use_cache": False} if native.can_generate() else {}
    for model in (native, ours):
        set_attention(model, "eager")
    # What a class that cannot switch has (Falcon).
    ours.set_attn_implementation(native.config._attn_implementation)
    for model in (native, ours):
        model.zero_grad()
        model(**batch, **arguments).loss.backward()
    family = family_of(native.config.model_type)
    # By the names under which tied parameters are stored; a parameter that nothing reads has no gradient.
    theirs, own = (
        {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name in stored_tensors(model)
        }
        for model in (native, ours)
    )
    shapes = {name: gradient.shape for name, gradient in theirs.items()}
    steps = rules.plan(family.rules_for(head or family.primary), list(own), shapes, to_native=True)
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
    """Greedy, beam-search and sampled tokens with the cache, from a left-padded batch (an encoder's: right-padded)."""
    padding = "right padding" if native.config.is_encoder_decoder else "left padding"
    inputs = padded_inputs(native.config.vocab_size, 2 * 10, native.config.pad_token_id)[padding]
    failures = []
    for beams, sampled in ((1, False), (3, False), (1, True)):
        tokens = []
        for model in (native, ours):
            set_seed(0)
            tokens.append(
                model.generate(
                    inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=sampled, num_beams=beams,
                    max_new_tokens=12, min_new_tokens=12, pad_token_id=native.config.pad_token_id or 0,
                    eos_token_id=None, forced_eos_token_id=None,
                )
            )  # fmt: skip
        if not torch.equal(*tokens):
            failures.append(f"{'sampled ' * sampled}tokens with {beams} beams")
    return failures


def check_round_trip(native: PreTrainedModel, ours: PreTrainedModel) -> list[str]:
    """The export: every tensor and buffer bit-equal, and the config that the stock class itself would write."""
    restored = hf_variants.to_native(ours, native.config.model_type)
    failures = []
    if type(restored).__name__ != type(native).__name__:
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
    head = family_of(native.config.model_type).head_of(type(native).__name__)
    again = config_map.to_variant(config_map.to_native(ours.config, head), head=head)
    reloaded = type(ours.config)(**json.loads(ours.config.to_json_string(use_diff=False)))
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
    gradient_bound = max((deviation.bound for deviation in deviations), default=0.0)
    bound = family.bound(ours.config)
    weights = [{k: v.clone() for k, v in model.state_dict().items()} for model in (native, ours)]
    assert ours.num_parameters() == native.num_parameters()
    failures = check_round_trip(native, ours) + check_config_bijection(native, ours)
    failures += check_logits(native, ours, row, bound)
    for model, saved in zip((native, ours), weights):
        upcast_weights(model, saved)
    failures += check_gradients(native, ours, gradient_bound)
    if row.generates and native.can_generate():
        failures += check_generation(native, ours, row)
    for head in row.heads:
        native = random_native(row, seed, head)
        ours = hf_variants.from_native(native)
        found = check_round_trip(native, ours) + check_logits(native, ours, row, bound)
        failures += [f"{head}: {failure}" for failure in found]
    return failures
