"""
Mistral's own checkpoints: consolidated.safetensors (or consolidated.00.pth) with params.json, as for mistral-inference.

Tensors have the names of Meta's Llama, and rotations turn neighbouring channels as there. Settings are those of
mistral-inference 1.6, and what vLLM reads beside them.
"""

from pathlib import Path

from hf_variants.model.configuration_variant import VariantConfig

from ..errors import ConversionError
from ..json_files import read_object
from ..pickles import load_state_dict
from ..tensor_files import Safetensors, Unread
from .meta import RULES
from .source import ForeignCheckpoint, Settings


NAMES = ("consolidated.safetensors", "consolidated.00.pth")
# As many positions as mistral-inference prepares.
CONTEXT = 128_000


def _files(path: Path) -> list[Path]:
    return [file for name in NAMES if (file := path / name).is_file()] if path.is_dir() else [path]


def finds(path: Path) -> bool:
    params = (path if path.is_dir() else path.parent) / "params.json"
    files = _files(path)
    if not files or files[0].name not in NAMES or not params.is_file():
        return False
    if files[0].suffix == ".safetensors":
        return True
    try:
        # Meta's pickles have the same name, and a width that follows from others.
        return "hidden_dim" in read_object(params)
    except ConversionError:
        return False


def _windows(settings: Settings, layers: int) -> tuple[int | None, list[str] | None]:
    """`sliding_window` and `layer_types`: a window of all layers, or a pattern of windows that repeats."""
    # By another name where an engine is not to see it.
    names = [name for name in ("sliding_window", "_sliding_window") if settings.peek(name, None) is not None]
    if len(names) == 2:
        raise ConversionError(f"{settings.where} has `sliding_window` and `_sliding_window`. Remove one of them.")
    value = settings.take(names[0], (int, list), None) if names else None
    settings.pass_over("sliding_window", "_sliding_window")
    pattern = value if isinstance(value, list) else [value]
    sizes = {size for size in pattern if size is not None}
    whole = all(type(size) is int and size > 0 for size in sizes)
    if not whole or not pattern or layers % len(pattern):
        raise ConversionError(
            f"`{names[0]}` in {settings.where} is {value!r}. Give a number of positions, or a list of numbers and null "
            f"whose length divides the {layers} layers."
        )
    if len(sizes) > 1:
        raise ConversionError(
            f"`{names[0]}` in {settings.where} has windows of {sorted(sizes)} positions, and a variant has one. This "
            "checkpoint cannot be converted."
        )
    if not sizes:
        return None, None
    kinds = ["full_attention" if size is None else "sliding_attention" for size in pattern]
    return sizes.pop(), kinds * (layers // len(kinds))


def _theta(settings: Settings, window: int | None) -> float:
    theta = settings.take("rope_theta", (int, float), None)
    if theta is None and window is not None:
        raise ConversionError(
            f"{settings.where} has windows and no `rope_theta`: mistral-inference took 10000 there until May 2024, and "
            "1000000 since. Add it: 10000 for Mistral 7B 0.1."
        )
    return 1000000.0 if theta is None else float(theta)


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    folder, files = (path if path.is_dir() else path.parent), _files(path)
    if len(files) > 1:
        raise ConversionError(f"{folder} has {NAMES[0]} and {NAMES[1]}. Name the one that is meant.")
    settings = Settings(read_object(folder / "params.json"), folder / "params.json")
    state = Safetensors(files[0]) if files[0].suffix == ".safetensors" else load_state_dict(files[0])
    weights = {name: each.header if isinstance(each, Unread) else each.to("meta") for name, each in state.items()}
    settings.refuse_but(
        model_type="transformer", moe=None, lora=None, vision_encoder=None, multimodal=None, quantization=None,
        yarn=None, llama_4_scaling=None, qk_nope_head_dim=None, activation="silu", use_biases=False, causal=True,
    )  # fmt: skip
    settings.pass_over("max_batch_size", "dtype")
    layers, heads = settings.layers("n_layers"), settings.count("n_heads")
    window, layer_types = _windows(settings, layers)
    context = settings.count("max_position_embeddings", None) or settings.count("max_seq_len", None)
    settings.pass_over("max_seq_len")
    tied = settings.take("tied_embeddings", bool, False) or "output.weight" not in weights
    config = VariantConfig(
        vocab_size=settings.count("vocab_size"), hidden_size=settings.count("dim"),
        intermediate_size=settings.count("hidden_dim"), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=settings.count("n_kv_heads"), head_dim=settings.count("head_dim"),
        max_position_embeddings=context or CONTEXT, norm_eps=float(settings.take("norm_eps", (int, float))),
        sliding_window=window, layer_types=layer_types,
        rope_parameters={"rope_type": "default", "rope_theta": _theta(settings, window)},
        rope_interleaved=True, rope_in_float32=True, rope_table_in_float32=True, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    settings.finish()

    def load(name: str):
        return each.load() if isinstance(each := state[name], Unread) else each

    return ForeignCheckpoint(
        code_base="Mistral",
        path=folder,
        files=files,
        config=config,
        rules=RULES,
        weights=weights,
        load=load,
        stored=state.__getitem__,
        ties={"output.weight": "tok_embeddings.weight"} if tied else {},
        notes=[]
        if context
        else [f"params.json does not say how long a text may be: `max_position_embeddings` is {CONTEXT}"],
        no_tokenizer="No tokenizer is converted: Mistral's is a file for mistral-common",
    )
