"""How long a device of a given speed needs at least, and what it waits for."""

from dataclasses import dataclass
from typing import Any

from ..model.part import Call, Part
from .cache import cache_bytes
from .compute import forward_flops
from .parameters import DTYPE_BYTES, count_parameters


@dataclass(frozen=True)
class Step:
    """
    One forward against the roofline (https://doi.org/10.1145/1498765.1498785).

    Attributes:
        flops: floating-point operations, of attention those that the mask leaves.
        bytes: of the weights, each read once, and of keys and values, each read once for every sequence.
        intensity: `flops / bytes`.
        seconds: at least, and per step; `None` where the device is not known.
        bound: what the device waits for: `"memory"` or `"compute"`.
    """

    flops: int
    bytes: int
    intensity: float
    seconds: float | None
    bound: str | None


def step(model: Part, call: Call, dtype: str, bandwidth: float | None, peak: float | None) -> Step:
    """
    Args:
        dtype: of weights and cache.
        bandwidth: bytes a second.
        peak: floating-point operations a second.
    """
    flops = forward_flops(model, call).masked
    cache = cache_bytes(
        model, call.past, batch=call.batch, source=call.source if call.source_is_cached else 0,
        value_bytes=DTYPE_BYTES[dtype],
    )  # fmt: skip
    moved = count_parameters(model).active * DTYPE_BYTES[dtype] + (cache.theory if cache is not None else 0)
    seconds = bound = None
    if bandwidth is not None and peak is not None:
        times = {"memory": moved / bandwidth, "compute": flops / peak}
        bound = max(times, key=lambda what: times[what])
        seconds = times[bound]
    return Step(flops, moved, flops / moved, seconds, bound)


def crossings(model: Part, config: Any, batch: int, dtype: str) -> dict[str, int]:
    """
    From which length on a step of decoding reads more of its keys and values than of its weights, with as many key/value
    heads as there are query heads (MHA), with those of the config, and with one (MQA). Windows are left out of account.
    """
    cache = cache_bytes(model, 1, batch=batch, value_bytes=DTYPE_BYTES[dtype])
    if cache is None or not cache.per_token:
        return {}
    weights = count_parameters(model).active * DTYPE_BYTES[dtype]
    decoder = config.decoder if config.is_encoder_decoder else config
    # Of all layers together, which may differ.
    layers = [layer for layer in decoder.per_layer_config if "self_attn" not in getattr(layer, "skip", ())]
    heads, own = (sum(getattr(layer, f"num_{kind}_heads") for layer in layers) for kind in ("attention", "key_value"))
    counts = sorted({layer.num_key_value_heads for layer in layers})
    kinds = {heads: "MHA", len(layers): "MQA"}
    if len(layers) < own < heads:
        kinds[own] = f"GQA with {' or '.join(map(str, counts))} heads"
    return {
        name: round(weights * own / (cache.per_token * count)) for count, name in sorted(kinds.items(), reverse=True)
    }
