"""nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT): GPT-2 with plain linear layers, biases or none."""

from pathlib import Path
from typing import Any

import torch

from hf_variants.model.configuration_variant import VariantConfig

from ..errors import ConversionError
from ..pickles import load_pickle
from ..rules import Rule, Split
from .source import ForeignCheckpoint, Settings, without_prefix


LAYER, OURS = "transformer.h.{layer}.", "model.layers.{layer}."
RULES = (
    Rule("transformer.wte.weight", "model.embed_tokens.weight"),
    Rule("transformer.wpe.weight", "model.embed_positions.weight"),
    Rule(LAYER + "ln_1.{leaf}", OURS + "self_attn_pre_norm.{leaf}"),
    Rule(
        LAYER + "attn.c_attn.{leaf}",
        tuple(OURS + f"self_attn.{name}_proj.{{leaf}}" for name in "qkv"),
        Split(lambda config: [config.hidden_size] * 3),
    ),
    Rule(LAYER + "attn.c_proj.{leaf}", OURS + "self_attn.o_proj.{leaf}"),
    Rule(LAYER + "ln_2.{leaf}", OURS + "mlp_pre_norm.{leaf}"),
    Rule(LAYER + "mlp.c_fc.{leaf}", OURS + "mlp.up_proj.{leaf}"),
    Rule(LAYER + "mlp.c_proj.{leaf}", OURS + "mlp.down_proj.{leaf}"),
    Rule("transformer.ln_f.{leaf}", "model.norm.{leaf}"),
    # Before it was tied, in January 2023.
    Rule("lm_head.weight", "lm_head.weight"),
)
# Until May 2023 GELU was the approximation by tanh, which no setting says.
UNSAID = (
    "The checkpoint does not say which GELU it was trained with, and has no optimizer that would tell: the exact one, of "
    "nanoGPT since May 2023, is taken; set `hidden_act` to gelu_new for one of before"
)


def _file(path: Path) -> Path:
    return path / "ckpt.pt" if path.is_dir() else path


def finds(path: Path) -> bool:
    file = _file(path)
    if not file.is_file() or file.suffix != ".pt" or (file.parent / "config.json").is_file():
        return False
    try:
        content = load_pickle(file)
    except ConversionError:
        return False
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def _is_causal_mask(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor, torch.ones_like(tensor).tril())


def config_of(arguments: Any, where: str | Path, hidden_act: str = "gelu", tied: bool = True) -> VariantConfig:
    """The config for the `model_args` of a checkpoint, and what they do not say."""
    settings = Settings(arguments, where)
    # There was no choice before January 2023, and no word on it.
    width, bias = settings.count("n_embd"), settings.take("bias", bool, True)
    dropout = settings.take("dropout", (int, float))
    config = VariantConfig(
        vocab_size=settings.count("vocab_size", 50257), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=settings.layers("n_layer"), num_attention_heads=settings.count("n_head"),
        max_position_embeddings=settings.count("block_size"), norm_type="layernorm", norm_eps=1e-5, norm_bias=bias,
        norm_placement="pre", position_embedding_type="learned", ffn_type="mlp", hidden_act=hidden_act,
        attention_bias=bias, attention_output_bias=bias, mlp_bias=bias, mlp_output_bias=bias, tie_word_embeddings=tied,
        attention_dropout=dropout, residual_dropout=dropout, embedding_dropout=dropout, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    settings.finish()
    return config


def _decayed(optimizer: Any) -> int | None:
    """How many tensors the optimizer's first group has, those that decay."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    first = groups[0] if isinstance(groups, list) and groups else None
    parameters = first.get("params") if isinstance(first, dict) else None
    return len(parameters) if isinstance(parameters, list) else None


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    file = _file(path)
    content = Settings(load_pickle(file), file)
    state, arguments = content.take("model", dict), content.take("model_args", dict)
    decayed = _decayed(content.peek("optimizer", None))
    content.pass_over("optimizer", "iter_num", "best_val_loss", "config")
    content.finish()
    state = without_prefix(state, f"`model` in {file}")
    # Four matrices of each layer, and the embeddings since eleven days before the other GELU.
    matrices = sum(tensor.ndim == 2 and name.startswith("transformer.h.") for name, tensor in state.items())
    is_old = "bias" not in arguments or decayed == matrices
    tied = "vocab_size" in arguments or "lm_head.weight" not in state
    where = f"`model_args` in {file}"
    config = config_of(arguments, where, "gelu_new" if is_old else "gelu", tied)
    return ForeignCheckpoint.of_state(
        "nanoGPT",
        file,
        config,
        RULES,
        state,
        ties={"lm_head.weight": "transformer.wte.weight"} if tied else {},
        computed={
            f"transformer.h.{layer}.attn.bias": _is_causal_mask
            for layer in range(config.num_hidden_layers)
            # Of the same name, and a mask: before torch had fused attention.
            if state.get(f"transformer.h.{layer}.attn.bias", torch.empty(0)).ndim == 4
        },
        notes=[] if is_old or decayed is not None else [UNSAID],
        no_tokenizer="The checkpoint has no tokenizer: nanoGPT takes tiktoken's gpt2, or the meta.pkl of its data",
    )
