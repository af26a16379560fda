"""Meta's Llama checkpoints: consolidated.NN.pth, one for each model-parallel rank, with params.json."""

import re
from functools import partial
from pathlib import Path

import torch

from hf_variants.model.configuration_variant import VariantConfig

from ..errors import ConversionError
from ..json_files import read_object
from ..pickles import load_state_dict
from ..rules import Rule
from .source import ForeignCheckpoint, Settings, leaf


LAYER, OURS = "layers.{layer}.", "model.layers.{layer}."
RULES = (
    Rule("tok_embeddings.weight", "model.embed_tokens.weight"),
    *(Rule(f"{LAYER}attention.w{name}.weight", f"{OURS}self_attn.{name}_proj.weight") for name in "qkvo"),
    Rule(LAYER + "feed_forward.w1.weight", OURS + "mlp.gate_proj.weight"),
    Rule(LAYER + "feed_forward.w3.weight", OURS + "mlp.up_proj.weight"),
    Rule(LAYER + "feed_forward.w2.weight", OURS + "mlp.down_proj.weight"),
    Rule(LAYER + "attention_norm.weight", OURS + "self_attn_pre_norm.weight"),
    Rule(LAYER + "ffn_norm.weight", OURS + "mlp_pre_norm.weight"),
    Rule("norm.weight", "model.norm.weight"),
    Rule("output.weight", "lm_head.weight"),
)
# Of which dimension a rank has a part; the others are whole in every one.
SPLIT = {r"(wq|wk|wv|w1|w3|output)\.weight": 0, r"(wo|w2)\.weight": 1}


def _shards(path: Path) -> list[Path]:
    return sorted((path if path.is_dir() else path.parent).glob("consolidated.*.pth"))


def finds(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    own = path.is_dir() or path in _shards(path)
    return own and (folder / "params.json").is_file() and bool(_shards(path))


class _Merged:
    """The tensors of all ranks as those of one."""

    def __init__(self, files: list[Path], width: int):
        numbers = [re.fullmatch(r"consolidated\.(\d+)\.pth", file.name) for file in files]
        if [int(match[1]) if match else -1 for match in numbers] != list(range(len(files))):
            raise ConversionError(
                f"{files[0].parent} has {', '.join(file.name for file in files)}, and not one for every rank from 00. "
                "Fetch the missing files."
            )
        self.ranks = [load_state_dict(file) for file in files]
        for file, rank in zip(files, self.ranks, strict=True):
            if different := sorted(rank.keys() ^ self.ranks[0].keys()):
                raise ConversionError(f"{file} and {files[0].name} disagree about {different[:5]}. Fetch them again.")
        self._width = width

    def _dimension(self, name: str) -> int | None:
        if name == "tok_embeddings.weight":
            # Llama 3 splits the vocabulary, those before it the width.
            return 0 if self.ranks[0][name].shape[1] == self._width else 1
        return next((dim for pattern, dim in SPLIT.items() if re.search(rf"(^|\.){pattern}$", name)), None)

    def load(self, name: str) -> torch.Tensor:
        parts = [rank[name] for rank in self.ranks]
        dimension = self._dimension(name)
        if len(parts) == 1 or dimension is not None:
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dimension)
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise ConversionError(f"{name} is whole in every file, and differs between them. Fetch them again.")
        return parts[0]

    def header(self, name: str) -> torch.Tensor:
        parts = [rank[name].to("meta") for rank in self.ranks]
        dimension = self._dimension(name)
        return parts[0] if dimension is None else torch.cat(parts, dim=dimension)


def _is_of_base(theta: float, width: int, stored: torch.Tensor) -> bool:
    """Whether a stored table has the frequencies of the formula, as far as its dtype goes."""
    expected = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return stored.shape == expected.shape and torch.allclose(stored.double(), expected, rtol=2**-7, atol=1e-6)


def _rope(settings: Settings, theta: float) -> dict:
    scaled, factor = (
        settings.take("use_scaled_rope", bool, False),
        settings.take("rope_scaling_factor", (int, float), None),
    )
    high = settings.take("rope_high_freq_factor", (int, float), None)
    if not scaled:
        return {"rope_type": "default", "rope_theta": theta}
    if factor is None:
        raise ConversionError(
            f"`use_scaled_rope` is set, and {settings.where} does not say by which factor. Add `rope_scaling_factor` to "
            "it: 8 for Llama 3.1 and 3.3, 32 for Llama 3.2."
        )
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": float(factor), "low_freq_factor": 1.0,
        "high_freq_factor": float(high or 4.0), "original_max_position_embeddings": 8192,
    }  # fmt: skip


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    folder, files = (path if path.is_dir() else path.parent), _shards(path)
    params = folder / "params.json"
    settings = Settings(read_object(params), params)
    width, heads = settings.count("dim"), settings.count("n_heads")
    merged = _Merged(files, width)
    weights = {name: merged.header(name) for name in merged.ranks[0]}
    theta = float(settings.take("rope_theta", (int, float), 10000.0))
    rope = _rope(settings, theta)
    # It stands for what the tokenizer knows, -1 in Llama 2; and what the network is wide follows from these.
    settings.pass_over("vocab_size", "multiple_of", "ffn_dim_multiplier", "max_batch_size")
    # Llama 1 and 2 do not say how long a text may be; the rotation does not depend on it.
    context = settings.count("max_seq_len", None) or (131072 if rope["rope_type"] == "llama3" else 4096)
    settings.refuse_but(
        moe_args=None, quantization_args=None, lora_args=None, vision_chunk_size=None, use_qk_norm=False
    )
    config = VariantConfig(
        vocab_size=leaf(weights, weights, "tok_embeddings.weight").shape[0], hidden_size=width,
        intermediate_size=leaf(weights, weights, ".w1.weight").shape[0], num_hidden_layers=settings.layers("n_layers"),
        num_attention_heads=heads, num_key_value_heads=settings.count("n_kv_heads", None) or heads,
        max_position_embeddings=max(context, 8192 if rope["rope_type"] == "llama3" else 1),
        norm_eps=float(settings.take("norm_eps", (int, float), 1e-5)), rope_parameters=rope, rope_interleaved=True,
        rope_in_float32=True, rope_table_in_float32=True, tie_word_embeddings="output.weight" not in weights,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    settings.finish()
    return ForeignCheckpoint(
        code_base="Meta's Llama",
        path=folder,
        files=files,
        config=config,
        rules=RULES,
        weights=weights,
        load=merged.load,
        stored=merged.load,
        computed={"rope.freqs": partial(_is_of_base, theta, config.head_dim)} if "rope.freqs" in weights else {},
        notes=[f"params.json does not say how long a text may be: `max_position_embeddings` is {context}"],
        no_tokenizer="No tokenizer is converted: Meta's is a file for sentencepiece or tiktoken",
    )
