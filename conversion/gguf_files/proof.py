"""Proof that a GGUF file was read right, by readers that are not ours: the package `gguf`, and transformers' loader."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .checkpoint import GGUFCheckpoint, Piece, open_checkpoint
from .layouts import Layout, OffsetNorm


# llama.cpp's name -> transformers', where its loader has another.
LOADER_NAMES = {"phi2": "phi"}
# Keys that say what follows from others, and what is no part of the model's arithmetic.
DERIVED = ("rope.dimension_count", "attention.key_length", "attention.value_length", "vocab_size", "context_length")
PROBE_LENGTH = 48


@dataclass
class Reading:
    """What a second reader says: whether it agrees (`None` where it cannot tell), and what was seen."""

    name: str
    ok: bool | None
    detail: str


def readings(path: Path, model: PreTrainedModel | None, ignore_keys: Iterable[str] = ()) -> list[Reading]:
    """
    Compare what was read from a file with what other readers see there.

    Args:
        model: the stock model that was read, or `None` where no stock class computes what is in the file.
    """
    opened = open_checkpoint(path, ignore_keys)
    if model is None:
        return [_against_gguf(opened, {name: opened.load(name) for name in opened.pieces})]
    return [_against_gguf(opened, model.state_dict()), _against_loader(opened, model)]


def _against_gguf(opened: GGUFCheckpoint, state: Mapping[str, torch.Tensor]) -> Reading:
    """Every tensor, brought back into llama.cpp's layout, against the package's own reader and its dequantisation."""
    name = "tensors against the package gguf"
    gguf = opened.file.package
    different, compared = [], 0
    rounded = False
    by_file: dict[str, list[tuple[str, int, Piece]]] = {}
    for native, pieces in opened.pieces.items():
        for index, piece in enumerate(pieces):
            by_file.setdefault(piece.name, []).append((native, index, piece))
    for part in opened.file.paths():
        reader = gguf.GGUFReader(part)
        for tensor in reader.tensors:
            expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True))
            for native, index, piece in by_file.get(tensor.name, ()):
                if native not in state:
                    # An older name, which transformers translates.
                    continue
                seen = _piece_of(opened, state[native], native, index, piece)
                wanted = expected if piece.rows is None else expected[piece.rows]
                compared += 1
                if isinstance(piece.layout, OffsetNorm):
                    rounded = True
                    equal = torch.allclose(seen, wanted, rtol=2.0**-23, atol=2.0**-23)
                else:
                    equal = torch.equal(seen, wanted)
                if not equal:
                    different.append(tensor.name)
    if different:
        return Reading(name, False, f"different: {different[:4]}")
    total = sum(len(pieces) for pieces in opened.pieces.values())
    return Reading(
        name,
        True,
        f"{compared} of {total}, bit-identical to its dequantisation"
        + (", norms to the last bit of 1 + w" if rounded else "")
        + ("; the class has other names for the rest" if compared < total else ""),
    )


def _piece_of(opened: GGUFCheckpoint, tensor: torch.Tensor, native: str, index: int, piece: Piece) -> torch.Tensor:
    """The part of a native tensor that a piece of the file became, laid out as there."""
    tensor = tensor.detach().cpu().float()
    if native.endswith("position_embeddings.weight"):
        tensor = tensor[opened.padded_rows :]
    sizes = [opened.file.tensors[each.name].shape[0] for each in opened.pieces[native]]
    if len(sizes) > 1:
        tensor = tensor.split(sizes)[index]
    return piece.layout.to_gguf(tensor, opened.heads.of(piece.name))


def _against_loader(opened: GGUFCheckpoint, model: PreTrainedModel) -> Reading:
    """The logits against those of transformers' own loader, where it reads every key and undoes every layout."""
    name = "logits against transformers' GGUF loader"
    unknown = _unknown_to_loader(opened)
    if unknown:
        return Reading(name, None, f"not compared, because it drops {', '.join(unknown[:4])}")
    path = opened.file.path
    try:
        theirs = type(model).from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    except (RuntimeError, ValueError, KeyError, ImportError) as error:
        return Reading(name, None, f"not compared, because it stops with {type(error).__name__}")
    ids = torch.arange(PROBE_LENGTH).reshape(1, -1) * 7919 % opened.config.vocab_size
    arguments = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    dtype = model.dtype
    with torch.no_grad():
        expected = theirs(ids, **arguments).logits
        made = model.float()(ids.to(model.device), **arguments).logits.cpu()
    model.to(dtype)
    if torch.equal(made, expected):
        return Reading(name, True, "bit-identical")
    return Reading(name, False, f"largest difference {(made - expected).abs().max().item():.1e}")


def _unknown_to_loader(opened: GGUFCheckpoint) -> list[str]:
    """What the file says, we read and transformers' loader does not; or why it cannot be asked."""
    # Only this needs it, and it is not public.
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING, TENSOR_PROCESSORS

    file, architecture = opened.file, opened.file.architecture
    table = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(LOADER_NAMES.get(architecture, architecture))
    if table is None or opened.family.own_config is not None:
        return [f"the architecture {architecture}"]
    if len(file.paths()) > 1:
        return ["all parts of a split file but one"]
    if f"{architecture}.vocab_size" not in file.metadata and "tokenizer.ggml.tokens" not in file.metadata:
        return ["the number of tokens"]
    prefix = f"{architecture}."
    dropped = [
        f"`{key}`"
        for key in sorted(opened.metadata.consumed & set(file.metadata))
        if (short := key.removeprefix(prefix)) not in DERIVED and short not in table
    ]
    dropped += sorted(opened.metadata.consumed_tensors)
    layouts = {type(piece.layout) for pieces in opened.pieces.values() for piece in pieces}
    if architecture not in TENSOR_PROCESSORS and layouts != {Layout}:
        dropped.append("the layout of its tensors")
    # The loader leaves these as the class has them.
    config = opened.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    if (getattr(config, "head_dim", None) or hidden // heads) != hidden // heads and not (
        {"attention.key_length", "rope.dimension_count"} & {key for key, value in table.items() if value is not None}
    ):
        dropped.append("`attention.key_length`")
    usual_scale = getattr(type(config)(), "query_pre_attn_scalar", None)
    if getattr(config, "query_pre_attn_scalar", None) != usual_scale:
        dropped.append("the scale of the scores")
    partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    usual = (getattr(type(config)(), "rope_parameters", None) or {}).get("partial_rotary_factor")
    if partial not in (None, usual):
        dropped.append("`rope.dimension_count`")
    dropped += [
        f"the tensors {name}.bias" for name in ("attn_q", "attn_output", "ffn_up") if _drops_bias(opened, name)
    ]
    return dropped


def _drops_bias(opened: GGUFCheckpoint, name: str) -> bool:
    """Whether the file has a bias that the class has only where its config says so, which the loader leaves as it is."""
    flags = ("attention_bias", "mlp_bias", "use_bias", "attention_out_bias")
    usual = type(opened.config)().to_dict()
    differs = any(flag in usual and getattr(opened.config, flag) != usual[flag] for flag in flags)
    return differs and opened.metadata.has(f"blk.0.{name}.bias")
