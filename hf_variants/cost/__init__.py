"""What an architecture costs, from its config alone: parameters, operations, caches, memory and time."""

from dataclasses import asdict, dataclass
from typing import Any

from ..model.part import Call
from .activations import Activations, activations
from .advice import advice
from .cache import CacheBytes, cache_bytes
from .compute import Flops, backward_flops, forward_flops
from .layers import LayerKind, layer_kinds, path_length
from .memory import Plan, RankMemory, largest_batch, largest_length, rank_memory
from .parameters import DTYPE_BYTES, Parameters, count_parameters, structure, weight_bytes
from .speed import Step, crossings, step
from .subject import read_subject, subject_of
from .training_step import StepMemory, step_memory


@dataclass(frozen=True)
class Cost:
    """
    What `cost` finds.

    Attributes:
        name: of the config.
        class_name: of the model.
        settings: the arguments that were asked with.
        parameters: see `Parameters`.
        weights: bytes by dtype.
        forward: operations of a forward over `batch` times `length` tokens, with logits for all.
        backward: operations of the backward.
        forward_per_token: operations of the forward for one token.
        prefill, decode: one step each, of generation; `None` for an encoder.
        cache: bytes after `length + generate` tokens; `None` for an encoder.
        fused_activations, eager_activations: what a training step on `batch` times `length` tokens keeps for its backward,
            with either attention, on one device.
        memory: of every pipeline stage's rank, without activations.
        fused_step, eager_step: a training step on `batch` times `length` tokens at its largest, with either attention;
            `None` with adapters, or where `plan` divides the model or its states among devices.
        largest_batch, largest_length: that fit `memory_limit` in generation; `None` without a limit or a cache.
        crossings: see `speed.crossings`.
        layers: see `layers.layer_kinds`.
        path_length: see `layers.path_length`.
        advice: sentences.
    """

    name: str
    class_name: str
    settings: dict[str, Any]
    parameters: Parameters
    weights: dict[str, int]
    forward: Flops
    backward: int
    forward_per_token: float
    prefill: Step | None
    decode: Step | None
    cache: CacheBytes | None
    fused_activations: Activations
    eager_activations: Activations
    memory: list[RankMemory]
    fused_step: StepMemory | None
    eager_step: StepMemory | None
    largest_batch: int | None
    largest_length: int | None
    crossings: dict[str, int]
    layers: list[LayerKind]
    path_length: int | None
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def cost(
    subject: Any,
    *,
    batch: int = 1,
    length: int | None = None,
    generate: int = 0,
    source: int | None = None,
    dtype: str = "bfloat16",
    block_size: int = 16,
    plan: Plan | None = None,
    lora_rank: int | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    memory: float | None = None,
) -> Cost:
    """
    What a config costs. No weight is made; activations are counted on an empty model.

    Args:
        subject: a config of ours or of a native type, or what `read_subject` reads: a path, a preset, a Hub id.
        batch: number of sequences.
        length: tokens of each, by default 2048 or what the model was trained for; of an encoder-decoder, the target's.
        generate: tokens that follow.
        source: tokens of an encoder-decoder's source (default: `length`).
        dtype: of weights, activations and cache: float32, bfloat16 or float16.
        block_size: tokens of a block of a paged cache.
        plan: how training is spread over devices; see `Plan`.
        lora_rank: rank of adapters, which alone are trained then.
        bandwidth, flops: of the device, bytes and operations a second.
        memory: bytes of a device.

    Raises:
        ValueError: if the config stands for no variant, or the plan does not fit it.
    """
    if generate < 0:
        raise ValueError(f"`generate` is {generate}. Set it to 0 or more.")
    config, class_name = read_subject(subject) if isinstance(subject, str) else subject_of(subject)
    decoder = config.decoder if config.is_encoder_decoder else config
    length = length or min(decoder.max_position_embeddings, 2048)
    source = (source or length) if config.is_encoder_decoder else 0
    plan = plan or Plan()
    model = structure(config, class_name)
    end = length + generate
    training = Call(batch, length, source=source)
    sizes = {"batch": batch, "source": source, "value_bytes": DTYPE_BYTES[dtype]}
    cache = cache_bytes(model, end, block_size=block_size, **sizes)
    prefill = decode = None
    if cache is not None:
        cached = Call(batch, 1, past=end - 1, source=source, source_is_cached=True)
        prefill = step(model, Call(batch, length, source=source, logits=1), dtype, bandwidth, flops)
        decode = step(model, cached, dtype, bandwidth, flops)
    forward = forward_flops(model, training)
    room = memory if cache is not None else None
    is_whole = lora_rank is None and plan.is_whole
    return Cost(
        name=subject if isinstance(subject, str) else config.name_or_path or config.model_type,
        class_name=model.cls.__name__,
        settings={
            "batch": batch, "length": length, "generate": generate, "source": source, "dtype": dtype,
            "block_size": block_size, "lora_rank": lora_rank, "bandwidth": bandwidth, "flops": flops, "memory": memory,
            **asdict(plan),
        },
        parameters=count_parameters(model, lora_rank),
        weights=weight_bytes(model),
        forward=forward,
        backward=backward_flops(model, training, plan.checkpointing),
        forward_per_token=forward.dense / (batch * length),
        prefill=prefill,
        decode=decode,
        cache=cache,
        fused_activations=activations(model, training, dtype=dtype),
        eager_activations=activations(model, training, dtype=dtype, fused=False),
        memory=rank_memory(model, plan, dtype, lora_rank),
        fused_step=step_memory(model, training, plan, dtype) if is_whole else None,
        eager_step=step_memory(model, training, plan, dtype, fused=False) if is_whole else None,
        largest_batch=largest_batch(model, room, end, dtype, source) if room is not None else None,
        largest_length=largest_length(model, room, batch, dtype, source) if room is not None else None,
        crossings=crossings(model, config, batch, dtype),
        layers=layer_kinds(decoder, length),
        path_length=path_length(model, length),
        advice=advice(decoder),
    )  # fmt: skip


__all__ = ["Cost", "Plan", "cost"]
