"""A GGUF file as a native checkpoint: its config, and its tensors under native names in native layout."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .. import block_configs
from ..errors import ConversionError, UnsupportedModelType
from ..family import Family, family_of
from ..skeleton import empty_model, stored_tensors
from .architectures import ARCHITECTURES, ROBERTA_PADDING, Architecture
from .container import GGUFFile
from .layouts import AS_IT_IS, Heads, Layout
from .metadata import Metadata
from .rotary import rope_parameters


# What llama.cpp calls the size of a norm's epsilon, and what native classes do.
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# A native flag -> tensors of the first layer of which one is there where it is set.
BIASES = {
    "attention_bias": ("attn_q.bias", "attn_qkv.bias"),
    "use_qkv_bias": ("attn_q.bias", "attn_qkv.bias"),
    "use_bias": ("attn_q.bias", "attn_qkv.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "mlp_bias": ("ffn_up.bias",),
    "norm_bias": ("attn_norm.bias", "ffn_norm.bias"),
}
KINDS = {
    "adapter": "a LoRA adapter and no model. Convert the model that it belongs to",
    "mmproj": "the part of a multimodal model that reads images or sound. Give the file with its language model",
    "imatrix": "statistics for quantisation and no model",
}
ACTIVATION_PARAMETERS = ("alpha_p", "alpha_n", "beta", "eps")
Load = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """
    A native tensor in the file.

    Attributes:
        name: in the file.
        layout: how it lies there.
        rows: the part of it that this tensor is, or `None` for all.
    """

    name: str
    layout: Layout = AS_IT_IS
    rows: slice | int | None = None


@dataclass
class GGUFCheckpoint:
    """
    A GGUF file, understood and not yet read.

    Attributes:
        file, metadata: as they are read.
        family, head, config: of the native type.
        native: the native model without memory for its weights.
        pieces: native name -> where it lies; several of them are stacked in order.
        settings: native name -> values that the file has among its keys.
        heads: of the attention.
        padded_rows: how many rows of zeros stand before the position table.
        notes: what the reader of a report should know.
    """

    file: GGUFFile
    metadata: Metadata
    family: Family
    head: str
    config: PreTrainedConfig
    native: PreTrainedModel
    pieces: dict[str, list[Piece]]
    settings: dict[str, torch.Tensor]
    heads: Heads
    padded_rows: int
    notes: list[str]

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype

    @property
    def has_pooler(self) -> bool:
        """Whether a pooler belongs to the native class, and is in the file, which llama.cpp's never have."""
        return "add_pooling_layer" not in signature(type(self.native).__init__).parameters

    def names(self) -> list[str]:
        return [*self.pieces, *self.settings]

    def load(self, name: str) -> torch.Tensor:
        """One tensor in native layout, in the file's dtype."""
        return self._made(name, self.file.load)

    def header(self, name: str) -> torch.Tensor:
        """Shape and dtype of the same, as a tensor without values; nothing is dequantised for it."""
        return self._made(name, self.file.header).to("meta")

    def _made(self, name: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if name in self.settings:
            return self.settings[name].to(self.dtype)
        made = []
        for piece in self.pieces[name]:
            tensor = load(piece.name)
            tensor = tensor if piece.rows is None else tensor[piece.rows].clone()
            made.append(self._native(piece, tensor).to(self.dtype))
        tensor = made[0] if len(made) == 1 else torch.cat(made)
        if name.endswith("position_embeddings.weight") and self.padded_rows:
            tensor = torch.cat([tensor.new_zeros(self.padded_rows, tensor.shape[1]), tensor])
        return tensor.contiguous()

    def _native(self, piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
        heads = self.heads.of(piece.name)
        try:
            return piece.layout.to_native(tensor, heads)
        except RuntimeError as error:
            raise ConversionError(
                f"The rows of {piece.name} in {self.file.path} ({tensor.shape[0]}) are not those of {heads.queries} "
                f"heads of queries and {heads.keys} of keys (`attention.head_count`, `attention.head_count_kv`). The "
                "file is damaged."
            ) from error

    def generation_config(self) -> GenerationConfig:
        """The native config's, with every token that ends a text and the recommended sampling."""
        config = GenerationConfig.from_model_config(self.config)
        values = self.file.metadata
        ends = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        if ends:
            config.eos_token_id = ends if len(ends) > 1 else ends[0]
        sampling = {
            "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "penalty_repeat",
        }  # fmt: skip
        found = {
            ours: value
            for ours, theirs in sampling.items()
            if (value := values.get(f"general.sampling.{theirs}")) is not None
        }
        if found.get("temperature") != 0.0 and found.keys() - {"repetition_penalty"}:
            found["do_sample"] = True
        elif "temperature" in found:
            del found["temperature"]
        config.update(**found)
        return config


def open_checkpoint(path: str | Path, ignore_keys: Iterable[str] = ()) -> GGUFCheckpoint:
    """
    Understand a GGUF file: every key and every tensor is consumed, known to be irrelevant, or refused by name.

    Raises:
        FileNotFoundError: if it, or a part of it, is not there.
        UnsupportedModelType: if its architecture is not known here.
        ConversionError: if it is damaged, or says what the native class does not compute.
    """
    return understand(GGUFFile(path), ignore_keys)


def understand(file: GGUFFile, ignore_keys: Iterable[str] = ()) -> GGUFCheckpoint:
    """The same of an opened file; of one that is yet to be written, too."""
    architecture = _architecture(file)
    metadata = Metadata(file, ignore_keys)
    model_type = architecture.type_of(metadata)
    family = family_of(model_type)
    head = architecture.head or family.primary
    padded_rows = ROBERTA_PADDING + 1 if model_type in ("roberta", "xlm-roberta") else 0
    config, heads, tied = _config(metadata, architecture, family)
    native = native_model(family, head, config)
    pieces = _pieces(metadata, architecture, family, native, config, heads, tied)
    settings = _settings(file, native)
    metadata.refuse_leftovers()
    notes = _notes(file, model_type, config, padded_rows)
    return GGUFCheckpoint(
        file, metadata, family, head, config, native, pieces, settings, heads, padded_rows, notes
    )  # fmt: skip


def _architecture(file: GGUFFile) -> Architecture:
    kind = file.metadata.get("general.type", "model")
    if file.architecture == "clip":
        kind = "mmproj"
    if kind in KINDS:
        raise ConversionError(f"{file.path} holds {KINDS[kind]}.")
    if not file.architecture:
        raise ConversionError(f"{file.path} has no key `general.architecture`. It holds no model.")
    if not file.tensors:
        raise ConversionError(f"{file.path} holds a vocabulary and no weights. Give the file of a model.")
    if file.architecture not in ARCHITECTURES:
        experts = file.metadata.get(f"{file.architecture}.expert_count")
        reason = "mixture-of-experts feed-forward layers are missing here" if experts else "it is not known here"
        raise UnsupportedModelType(
            f"{file.path} has llama.cpp's architecture {file.architecture!r}: {reason}. GGUF files of these are read: "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if experts := file.metadata.get(f"{file.architecture}.expert_count"):
        raise UnsupportedModelType(
            f"{file.path} has {experts} experts per layer (`{file.architecture}.expert_count`), and mixture-of-experts "
            "feed-forward layers are missing here. Use a dense model."
        )
    return ARCHITECTURES[file.architecture]


def _config(metadata: Metadata, architecture: Architecture, family: Family) -> tuple[PreTrainedConfig, Heads, bool]:
    config_class = family.config_map.native_class
    known = config_class().to_dict()
    common = _common(metadata, architecture, known)
    values = {**common, **architecture.options(metadata, common)}
    aliases = getattr(config_class, "attribute_map", {})
    named = {aliases.get(name, name): value for name, value in values.items()}
    width = common["intermediate_size"]
    has_width = {"intermediate_size", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim"} & named.keys() & known.keys()
    if not has_width and width not in (None, 4 * common["hidden_size"]):
        raise ConversionError(
            f"`{metadata.name('feed_forward_length')}` is {width}, and the native class always takes four times "
            f"the width, which is {common['hidden_size']}."
        )
    derived = common["hidden_size"] // common["num_attention_heads"]
    kept = {
        name: value
        for name, value in named.items()
        # A class that does not declare it may read `head_dim` all the same.
        if name in known or name in (*OPTIONAL, *architecture.undeclared) or (name == "head_dim" and value != derived)
    }
    heads = Heads(common["num_attention_heads"], common["num_key_value_heads"], _own_heads(values))
    try:
        return config_class(**kept), heads, common["tie_word_embeddings"]
    except (StrictDataclassError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ConversionError(
            f"{metadata.file.path} describes no {family.model_type} model ({' '.join(str(error).split())})."
        ) from error


def _own_heads(values: dict[str, Any]) -> dict[int, Heads]:
    """Of layers that have some of their own."""
    entries = enumerate(values.get("block_configs", ()))
    found = {layer: entry["attention"] for layer, entry in entries if not entry["attention"].get("no_op")}
    return {layer: Heads(own["num_attention_heads"], own["num_key_value_heads"]) for layer, own in found.items()}


# Keys of native configs that not every release's class shows.
OPTIONAL = (
    "layer_types", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "rope_parameters",
)  # fmt: skip


def _common(metadata: Metadata, architecture: Architecture, known: dict[str, Any]) -> dict[str, Any]:
    """What most architectures write alike, under transformers' standard names."""
    file = metadata.file
    uniform = metadata.usual if architecture.layers_differ else metadata.uniform
    heads, hidden = uniform("attention.head_count"), metadata.need("embedding_length")
    if heads is None:
        raise ConversionError(f"{file.path} has no key `{metadata.name('attention.head_count')}`. It is incomplete.")
    vocab_size = file.tensors["token_embd.weight"].shape[0] if metadata.has("token_embd.weight") else None
    stated = metadata.get("vocab_size", vocab_size)
    if vocab_size is None or stated != vocab_size:
        raise ConversionError(
            f"`{metadata.name('vocab_size')}` is {stated}, and token_embd.weight has {vocab_size} rows. The file is "
            "damaged."
        )
    head_dim = _head_dim(metadata, heads, hidden)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": uniform("feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": uniform("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": metadata.get("context_length"),
        "tie_word_embeddings": _tied(metadata, known),
        # Decoders that start from it, and encoders, have one also where a file is silent.
        **_token_ids(file, known, needs_padding=file.architecture == "t5" or architecture.head == "base"),
    }
    if values["max_position_embeddings"] is None:
        # BLOOM has none, and needs none.
        del values["max_position_embeddings"]
    if (values["pad_token_id"] or 0) >= vocab_size:
        values["pad_token_id"] = None
    values |= _epsilon(metadata, known)
    values |= {
        flag: any(metadata.has(f"blk.{layer}.{name}") for name in names for layer in (0, 1))
        for flag, names in BIASES.items()
        if flag in known
    }
    causal = metadata.get("attention.causal")
    if causal is not None and causal == (architecture.head == "base"):
        raise ConversionError(
            f"`{metadata.name('attention.causal')}` is {causal}, which the native class does not compute."
        )
    if "rope_parameters" in known:
        values["rope_parameters"] = rope_parameters(metadata, head_dim, architecture.says_partial)
    return values


def _head_dim(metadata: Metadata, heads: int, hidden: int) -> int:
    keys, values = metadata.uniform("attention.key_length"), metadata.uniform("attention.value_length")
    if keys is not None and values is not None and keys != values:
        raise ConversionError(
            f"`{metadata.name('attention.key_length')}` is {keys} and `{metadata.name('attention.value_length')}` is "
            f"{values}. Heads whose keys and values differ in width are missing here."
        )
    for name in ("blk.0.attn_q.weight", "enc.blk.0.attn_q.weight"):
        if keys is None and metadata.has(name):
            # Old files do not say it.
            return metadata.file.tensors[name].shape[0] // heads
    return keys or hidden // heads


def _tied(metadata: Metadata, known: dict[str, Any]) -> bool:
    if not metadata.has("output.weight"):
        return True
    # Some writers store a tied head all the same.
    return bool(known.get("tie_word_embeddings")) and metadata.file.same_bytes("output.weight", "token_embd.weight")


def _token_ids(file: GGUFFile, known: dict[str, Any], needs_padding: bool) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {
        ours: file.metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()
    }  # fmt: skip
    kind = file.metadata.get("tokenizer.ggml.model")
    # What llama.cpp takes where a file is silent.
    usual = {"llama": {"bos_token_id": 1, "eos_token_id": 2}, "t5": {"eos_token_id": 1, "pad_token_id": 0}}
    if kind == "t5" and file.architecture == "bert":
        usual = {}
    found = {name: usual.get(kind, {}).get(name) if value is None else value for name, value in found.items()}
    if found["pad_token_id"] is None and needs_padding:
        found["pad_token_id"] = known.get("pad_token_id")
    return found


def _epsilon(metadata: Metadata, known: dict[str, Any]) -> dict[str, Any]:
    name = next((name for name in EPSILONS if name in known), None)
    found = {metadata.get(f"attention.layer_norm_{kind}epsilon") for kind in ("", "rms_")} - {None}
    if len(found) > 1:
        raise ConversionError(f"{metadata.file.path} has two epsilons for its norms, {sorted(found)}.")
    if name is None or not found:
        return {}
    return {name: found.pop()}


def native_model(family: Family, head: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The native model without memory; llama.cpp's encoders have no pooler."""
    model_class = family.native_class(head)
    if block_configs.overrides(config):
        return block_configs.native_skeleton(family, head, config)
    if "add_pooling_layer" in signature(model_class.__init__).parameters:
        return empty_model(model_class, config, add_pooling_layer=False)
    return empty_model(model_class, config)


def _pieces(
    metadata: Metadata,
    architecture: Architecture,
    family: Family,
    native: PreTrainedModel,
    config: PreTrainedConfig,
    heads: Heads,
    tied: bool,
) -> dict[str, list[Piece]]:
    """Where every native tensor lies; a tensor of the file that is none of them is an error that names it."""
    file = metadata.file
    package = file.package
    number = next(arch for arch, name in package.MODEL_ARCH_NAMES.items() if name == file.architecture)
    layers = max(config.num_hidden_layers, getattr(config, "num_decoder_layers", None) or 0)
    table = package.get_tensor_name_map(number, layers)
    names = list(stored_tensors(native))
    if family.loosely_tied and not tied:
        names.append(family.loosely_tied)
    if architecture.stored_names:
        names = [
            name.format(layer=layer)
            for name in architecture.stored_names
            for layer in (range(layers) if "{layer}" in name else (0,))
        ]
    pieces: dict[str, list[Piece]] = {}
    for name in names:
        found = _find(name, table, architecture, file, heads)
        if found:
            pieces[name] = found
    used = {piece.name for found in pieces.values() for piece in found} | metadata.consumed_tensors
    if tied:
        # The same as the embeddings, if it is there.
        used.add("output.weight")
    left = sorted(set(file.tensors) - used)
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise ConversionError(
            f"{file.path} has tensors that a {family.model_type} model with these settings does not have: {shown}. It "
            "belongs to another architecture, or holds parts that are missing here."
        )
    return pieces


def _find(name: str, table: Any, architecture: Architecture, file: GGUFFile, heads: Heads) -> list[Piece]:
    """A native tensor's pieces; none if the file does not have it."""
    stem, _, leaf = name.rpartition(".")
    # BLOOM was read without its prefix.
    theirs = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))

    def piece(gguf_name: str, rows: slice | int | None = None) -> Piece:
        return Piece(gguf_name, architecture.layout(gguf_name) or AS_IT_IS, rows)

    if theirs is not None and f"{theirs}.{leaf}" in file.tensors:
        return [piece(f"{theirs}.{leaf}")]
    if stem.endswith("W_pack"):
        block = f"blk.{stem.split('.')[2]}."
        parts = [f"{block}attn_{part}.{leaf}" for part in "qkv"]
        return [piece(part) for part in parts] if all(part in file.tensors for part in parts) else []
    if ".norms." in stem:
        # One norm per head, stacked: model.layers.0.self_attn.q_layernorm.norms.3
        *_, layer, _, norm, _, head = stem.split(".")
        stacked = f"blk.{layer}.attn_{norm[0]}_norm.weight"
        return [piece(stacked, int(head))] if stacked in file.tensors else []
    if theirs is not None and theirs.rpartition(".")[2] in ("attn_q", "attn_k", "attn_v"):
        block, _, part = theirs.rpartition(".")
        fused = f"{block}.attn_qkv.{leaf}"
        if fused in file.tensors:
            return [piece(fused, rows_of(file.tensors[fused].shape[0], heads.of(fused), part[-1]))]
    return []


def rows_of(rows: int, heads: Heads, part: str) -> slice:
    """The rows of queries, keys or values in a fused projection."""
    head_dim = rows // (heads.queries + 2 * heads.keys)
    keys_from = heads.queries * head_dim
    values_from = keys_from + heads.keys * head_dim
    return {"q": slice(0, keys_from), "k": slice(keys_from, values_from), "v": slice(values_from, rows)}[part]


def _settings(file: GGUFFile, native: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of learned activations, which the file has among its keys with one value per layer."""
    found = {}
    for name, tensor in stored_tensors(native).items():
        stem, _, leaf = name.rpartition(".")
        values = file.metadata.get(f"xielu.{leaf}")
        if stem.endswith(".act_fn") and leaf in ACTIVATION_PARAMETERS and values is not None:
            layer = int(stem.split(".")[2])
            values = values if isinstance(values, list) else [values] * (layer + 1)
            found[name] = torch.full(tensor.shape, values[layer], dtype=torch.float32)
    return found


def _notes(file: GGUFFile, model_type: str, config: PreTrainedConfig, padded_rows: int) -> list[str]:
    notes = []
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None and config.head_dim != scalar:
        notes.append(
            f"the file does not say the scale of the attention's scores; `query_pre_attn_scalar` {scalar} is taken, as "
            f"llama.cpp does for a {model_type} with as many layers"
        )
    if padded_rows:
        notes.append(f"the first {padded_rows} rows of the position table, which no token reads, are zeros")
    if (pooling := file.metadata.get(f"{file.architecture}.pooling_type")) is not None:
        kind = file.package.PoolingType(pooling).name.lower() if pooling in list(file.package.PoolingType) else pooling
        notes.append(
            f"the file pools hidden states by {kind!r} to embed a text, which a converted model leaves to you"
        )
    return notes
