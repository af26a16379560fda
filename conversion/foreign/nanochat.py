"""nanochat's model_NNNNNN.pt with meta_NNNNNN.json (https://github.com/karpathy/nanochat), of its plain models."""

import re
from pathlib import Path

import torch

from hf_variants.model.configuration_variant import VariantConfig

from ..errors import ConversionError
from ..json_files import read_object
from ..pickles import load_state_dict
from ..rules import Rule
from .source import ForeignCheckpoint, Settings, without_prefix


LAYER, OURS = "transformer.h.{layer}.", "model.layers.{layer}."
RULES = (
    Rule("transformer.wte.weight", "model.embed_tokens.weight"),
    *(
        Rule(f"{LAYER}attn.c_{theirs}.weight", f"{OURS}self_attn.{ours}_proj.weight")
        for theirs, ours in {"q": "q", "k": "k", "v": "v", "proj": "o"}.items()
    ),
    Rule(LAYER + "mlp.c_fc.weight", OURS + "mlp.up_proj.weight"),
    Rule(LAYER + "mlp.c_proj.weight", OURS + "mlp.down_proj.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
)
# Tensors of mechanisms that later releases added, and no field expresses.
ADDED = {
    r"value_embed|\.ve_gate\.|v0_lambdas": "embeddings that are added to the values of attention",
    r"smear_": "the mixing of an embedding with the one before it",
    r"backout_": "the subtraction of what the middle layer gave",
    r"bigram_": "embeddings of pairs of tokens",
}
# Learned factors, and at what value they do nothing.
NEUTRAL = {
    "resid_lambdas": (1, "factors on what enters each layer"),
    "x0_lambdas": (0, "the addition of the embedding to what enters each layer"),
}
VOCABULARY = ("transformer.wte.weight", "lm_head.weight")


def _steps(folder: Path) -> list[Path]:
    """The files of weights that have their description beside them, by training step."""
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    }
    return [path for _, path in sorted(found.items()) if _description(path).is_file()]


def _description(weights: Path) -> Path:
    return weights.with_name(f"meta_{weights.stem.removeprefix('model_')}.json")


def finds(path: Path) -> bool:
    return bool(_steps(path)) if path.is_dir() else path in _steps(path.parent)


def config_of(values: object, where: str | Path) -> VariantConfig:
    """The config for the `model_config` of a checkpoint's description."""
    settings = Settings(values, where)
    width, heads = settings.count("n_embd"), settings.count("n_head")
    # Models from before there were windows say nothing.
    pattern = settings.take("window_pattern", str, "L").upper()
    if set(pattern) != {"L"}:
        raise ConversionError(
            f"`window_pattern` in {where} is {pattern!r}, and how long a window S stands for was changed between releases "
            "and is not said. Only patterns of L alone can be converted."
        )
    config = VariantConfig(
        vocab_size=settings.count("vocab_size"), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=settings.layers("n_layer"), num_attention_heads=heads,
        num_key_value_heads=settings.count("n_kv_head", None) or heads,
        max_position_embeddings=settings.count("sequence_len"), norm_type="rmsnorm", norm_affine=False,
        # As torch has it where no other is given.
        norm_eps=torch.finfo(torch.float32).eps, norm_placement="pre", embedding_norm=True, qk_norm="head",
        qk_norm_after_rope=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_reversed=True,
        ffn_type="mlp", hidden_act="relu2", final_logit_softcapping=15.0, tie_word_embeddings=False,
        initializer_scheme="depth_scaled_attention", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    settings.finish()
    return config


def _refuse_mechanisms(state: dict[str, torch.Tensor], file: Path) -> None:
    """All of them at once: each came with others, and with constants that no checkpoint holds."""
    found: dict[str, str] = {}
    for name, tensor in state.items():
        what = next((what for pattern, what in ADDED.items() if re.search(pattern, name)), None)
        neutral, factors = NEUTRAL.get(name, (None, ""))
        if neutral is not None and not torch.all(tensor == neutral):
            what = factors
        if what is not None:
            found.setdefault(what, name)
    if found:
        raise ConversionError(
            f"{file} has {', '.join(f'{what} ({name})' for what, name in found.items())}, which no field expresses. This "
            "checkpoint cannot be converted; those of nanochat before January 2026 can."
        )


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    file = _steps(path)[-1] if path.is_dir() else path
    description = _description(file)
    content = read_object(description)
    state = without_prefix(load_state_dict(file), file)
    _refuse_mechanisms(state, file)
    # The others are a log of the training, metrics of any name among them.
    config = config_of(content.get("model_config"), f"`model_config` in {description}")
    state = {name: tensor for name, tensor in state.items() if name not in NEUTRAL}
    notes = ["nanochat rounds cos and sin of the rotation to the dtype that it computes in, bfloat16 at first"]
    for name in VOCABULARY:
        if name in state and len(state[name]) > config.vocab_size:
            notes.append(f"{name} is without {len(state[name]) - config.vocab_size} rows that nanochat never uses")
            state[name] = state[name][: config.vocab_size]
    return ForeignCheckpoint.of_state("nanochat", file, config, RULES, state, notes=notes)
