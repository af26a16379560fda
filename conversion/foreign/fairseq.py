"""fairseq's Transformer checkpoints (https://github.com/facebookresearch/fairseq): translation, and language models."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig

from ..errors import ConversionError
from ..pickles import load_pickle
from ..rules import Rule, Split, some
from .source import ForeignCheckpoint, Settings, without_prefix


# In the order in which a folder's is taken; archives of published models have the last.
NAMES = ("checkpoint_best.pt", "checkpoint_last.pt", "model.pt")
# The first symbols of every dictionary of fairseq.
BOS, PAD, EOS = 0, 1, 2
ACTIVATIONS = {
    "relu": "relu", "relu_squared": "relu2", "gelu": "gelu", "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh", "tanh": "tanh", "linear": "linear",
}  # fmt: skip
# Whose `forward` is the Transformer's; others share its tensors and compute something else.
KINDS = re.compile(r"(transformer|transformer_lm|transformer_(iwslt|wmt|vaswani|lm|tiny|big)\w*|m?bart\w*)")
# Of the settings of models, those of training, of memory, and of mechanisms that are refused below.
UNREAD = (
    "_name", "arch", "relu_dropout", "adaptive_softmax_dropout", "adaptive_softmax_factor",
    "adaptive_input_factor", "tie_adaptive_weights", "tie_adaptive_proj", "checkpoint_activations", "offload_activations",
    "min_params_to_wrap", "quant_noise_pq_block_size", "base_sublayers", "base_shuffle", "export", "tpu",
    "character_filters", "character_embedding_dim", "char_embedder_highway_layers", "encoder_embed_path",
    "decoder_embed_path", "max_source_positions", "max_target_positions", "tokens_per_sample", "add_bos_token",
)  # fmt: skip
REFUSED: dict[str, Any] = {
    "adaptive_input": False, "adaptive_input_cutoff": None, "adaptive_softmax_cutoff": None, "char_inputs": False,
    "character_embeddings": False, "merge_src_tgt_embed": False, "no_cross_attention": False,
    "cross_self_attention": False, "quant_noise_pq": 0, "quant_noise_scalar": 0, "base_layers": 0, "scale_fc": False,
    "scale_attn": False, "scale_heads": False, "scale_resids": False, "encoder_layers_to_keep": None,
    "decoder_layers_to_keep": None, "encoder_xformers_att_config": None, "decoder_xformers_att_config": None,
}  # fmt: skip


def _layer_rules(theirs: str, ours: str, placement: str, is_decoder_of_two: bool) -> tuple[Rule, ...]:
    attentions = {"self_attn": "self_attn"} | ({"encoder_attn": "cross_attn"} if is_decoder_of_two else {})
    # Norms had numbers once.
    norms = {"self_attn_layer_norm": "self_attn", "final_layer_norm": "mlp", "layer_norms.0": "self_attn"}
    norms |= {"layer_norms.1": "cross_attn", "layer_norms.2": "mlp"} if is_decoder_of_two else {"layer_norms.1": "mlp"}
    norms |= {"encoder_attn_layer_norm": "cross_attn"} if is_decoder_of_two else {}
    theirs, ours = f"{theirs}layers.{{layer}}.", f"{ours}layers.{{layer}}."
    return (
        *(
            Rule(f"{theirs}{a}.{x}.{{leaf}}", f"{ours}{b}.{x.replace('out', 'o')}.{{leaf}}")
            for a, b in attentions.items()
            for x in ("q_proj", "k_proj", "v_proj", "out_proj")
        ),
        # As it was before the three were apart.
        *(
            Rule(
                f"{theirs}{a}.in_proj_{leaf}",
                tuple(f"{ours}{b}.{x}_proj.{leaf}" for x in "qkv"),
                Split(lambda config: [config.hidden_size] * 3),
            )
            for a, b in attentions.items()
            for leaf in ("weight", "bias")
        ),
        Rule(f"{theirs}fc1.{{leaf}}", f"{ours}mlp.up_proj.{{leaf}}"),
        Rule(f"{theirs}fc2.{{leaf}}", f"{ours}mlp.down_proj.{{leaf}}"),
        *(Rule(f"{theirs}{a}.{{leaf}}", f"{ours}{b}_{placement}_norm.{{leaf}}") for a, b in norms.items()),
    )


def _stack_rules(theirs: str, ours: str, placement: str, is_decoder_of_two: bool = False) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}embed_tokens.weight", f"{ours}embed_tokens.weight"),
        Rule(f"{theirs}embed_positions.weight", f"{ours}embed_positions.weight"),
        Rule(f"{theirs}layernorm_embedding.{{leaf}}", f"{ours}embedding_norm.{{leaf}}"),
        Rule(f"{theirs}layer_norm.{{leaf}}", f"{ours}norm.{{leaf}}"),
        *_layer_rules(theirs, ours, placement, is_decoder_of_two),
    )


HEAD = (
    Rule("decoder.output_projection.weight", "lm_head.weight"),
    Rule("decoder.embed_out", "lm_head.weight"),
)


def _file(path: Path) -> Path | None:
    if path.is_dir():
        return next((path / name for name in NAMES if (path / name).is_file()), None)
    return path if re.fullmatch(r"checkpoint\w*(\.\w+)*\.pt|model\.pt", path.name) else None


def finds(path: Path) -> bool:
    file = _file(path)
    if file is None or (file.parent / "config.json").is_file():
        return False
    try:
        content = _content(file)
    except ConversionError:
        # Of fairseq by its name, and refused in words when it is opened.
        return file.name.startswith("checkpoint") or any(file.parent.glob("dict*.txt"))
    return isinstance(content, Mapping) and "model" in content and bool({"args", "cfg"} & content.keys())


def _content(file: Path) -> Any:
    # A plain object of attributes, the one beside tensors that fairseq cannot do without.
    return load_pickle(file, (argparse.Namespace,))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`encoder: {layers: 6}` as `encoder_layers: 6`, which is how most checkpoints have it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("encoder", "decoder", "quant_noise") and isinstance(value, Mapping):
            flat |= {f"{key}_{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _settings(content: Settings) -> Settings:
    """Those of the model, and beside them, where the file has all in one, those of the training."""
    arguments, config = content.take("args", object, None), content.take("cfg", object, None)
    where: str | Path = f"`args` in {content.where}"
    is_all_in_one = arguments is not None
    task: Mapping = {}
    if arguments is None:
        where = f"`cfg.model` in {content.where}"
        if not isinstance(config, Mapping) or "model" not in config:
            raise ConversionError(f"{content.where} describes no model in `args` or `cfg`. Fetch the file again.")
        arguments, task = config["model"], config.get("task") or {}
        is_all_in_one = isinstance(arguments, argparse.Namespace)
    task = vars(task) if isinstance(task, argparse.Namespace) else task
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(values, Mapping) or not isinstance(task, Mapping):
        raise ConversionError(f"{where} is no map of settings. The file is damaged; fetch it again.")
    values = _flat(values)
    if is_all_in_one:
        # Of the hundreds that are beside the model's, the names do not begin so.
        known = {*UNREAD, *REFUSED, *_READ}
        values = {key: value for key, value in values.items() if key in known or re.match("(en|de)coder_", key)}
    if values.get("max_target_positions") is None:
        values["max_target_positions"] = task.get("max_target_positions")
    if values.get("max_target_positions") is None:
        values["max_target_positions"] = values.get("tokens_per_sample") or task.get("tokens_per_sample")
    return Settings(values, where)


_READ = {
    "activation_fn", "dropout", "attention_dropout", "activation_dropout", "relu_dropout", "layernorm_embedding",
    "no_scale_embedding", "no_token_positional_embeddings", "share_all_embeddings", "share_decoder_input_output_embed",
    "no_decoder_final_norm", "no_tie_adaptive_proj",
}  # fmt: skip


def _stack(settings: Settings, stack: str, common: dict, rows: int, length: int, final_norm: bool) -> VariantConfig:
    width = settings.count(f"{stack}_embed_dim", 512)
    for key in ("input_dim", "output_dim") if stack == "decoder" else ():
        if settings.take(f"decoder_{key}", int, width) != width:
            raise ConversionError(
                f"`decoder_{key}` in {settings.where} is not `decoder_embed_dim`, {width}, and the matrix between the two "
                "cannot be converted."
            )
    before = settings.take(f"{stack}_normalize_before", bool, False)
    learned = settings.take(f"{stack}_learned_pos", bool, False)
    no_positions = common["position_embedding_type"] == "none"
    return VariantConfig(
        **common
        | {
            "vocab_size": rows, "hidden_size": width,
            "intermediate_size": settings.count(f"{stack}_ffn_embed_dim", 2048),
            "num_hidden_layers": settings.layers(f"{stack}_layers", 6),
            "num_attention_heads": settings.count(f"{stack}_attention_heads", 8),
            "max_position_embeddings": length,
            "position_embedding_type": "none" if no_positions else "learned" if learned else "sinusoidal",
            # Of real tokens alone, from behind the padding token's index.
            "position_ids_source": "sequence" if no_positions else "attention_mask",
            "position_offset": 0 if no_positions else PAD + 1,
            "norm_placement": "pre" if before else "post", "final_norm": before and final_norm,
            "embedding_multiplier": (common["embedding_multiplier"] and width**0.5) or 1.0,
            "layerdrop": settings.take(f"{stack}_layerdrop", (int, float), 0.0),
            "is_causal": stack == "decoder",
        }
        | ({"sinusoidal_layout": "tensor2tensor", "sinusoidal_padding_zero": True, "sinusoidal_table_grows": True}
            if not learned and not no_positions else {})
    )  # fmt: skip


def _common(settings: Settings) -> dict:
    """The fields of both stacks."""
    activation = settings.take("activation_fn", str, "relu")
    if activation not in ACTIVATIONS:
        raise ConversionError(
            f"`activation_fn` in {settings.where} is {activation!r}, and only {', '.join(ACTIVATIONS)} can be expressed "
            "here. This checkpoint cannot be converted."
        )
    dropout = settings.take("dropout", (int, float), 0.1)
    inside = settings.take("activation_dropout", (int, float), 0.0) or settings.take("relu_dropout", (int, float), 0.0)
    return {
        "hidden_act": ACTIVATIONS[activation], "ffn_type": "mlp", "norm_type": "layernorm", "norm_eps": 1e-5,
        "residual_dropout": float(dropout), "embedding_dropout": float(dropout), "activation_dropout": float(inside or 0),
        "attention_dropout": float(settings.take("attention_dropout", (int, float), 0.0)), "attention_bias": True,
        "mlp_bias": True, "mlp_output_bias": True, "scale_query": True,
        "embedding_norm": settings.take("layernorm_embedding", bool, False),
        "embedding_multiplier": not settings.take("no_scale_embedding", bool, False),
        "position_embedding_type": "none" if settings.take("no_token_positional_embeddings", bool, False) else "learned",
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS,
    }  # fmt: skip


def _rows(state: Mapping[str, torch.Tensor], stack: str, where: Path) -> int:
    name = f"{stack}.embed_tokens.weight"
    if name not in state or state[name].ndim != 2:
        raise ConversionError(f"{where} has no table {name}: it is no Transformer of fairseq, or incomplete.")
    return len(state[name])


def config_of(
    settings: Settings, state: Mapping[str, torch.Tensor], file: Path
) -> tuple[VariantConfig | VariantSeq2SeqConfig, tuple[Rule, ...], dict[str, str]]:
    """Config, rules, and which tensors are copies of others."""
    kind = settings.take("arch", str, None) or settings.take("_name", str, "transformer")
    if not KINDS.fullmatch(kind):
        raise ConversionError(
            f"The model in {file} is {kind!r}, and of fairseq's the Transformer for translation and the language model are "
            "converted. This checkpoint cannot be."
        )
    is_pair = any(name.startswith("encoder.") for name in state)
    lengths = {
        stack: settings.count(f"max_{side}_positions", 1024)
        for stack, side in (("encoder", "source"), ("decoder", "target"))
    }
    common = _common(settings)
    one_table = settings.take("share_all_embeddings", bool, False)
    tied = settings.take("share_decoder_input_output_embed", bool, False) or one_table
    # As those were built that had an option by this name.
    was_built_without = settings.take("no_tie_adaptive_proj", bool, None) is not None
    without = settings.take("no_decoder_final_norm", bool, False) or was_built_without
    # Before version 3, stacks had no norm at their end.
    has_end = {
        stack: state.get(f"{stack}.version", torch.zeros(1)).max().item() > 2 for stack in ("encoder", "decoder")
    }
    decoder = _stack(
        settings,
        "decoder",
        common,
        _rows(state, "decoder", file),
        lengths["decoder"],
        has_end["decoder"] and not without,
    )
    ties = {"decoder.output_projection.weight": "decoder.embed_tokens.weight"} if tied else {}
    config: VariantConfig | VariantSeq2SeqConfig
    if is_pair:
        rows = _rows(state, "encoder", file)
        encoder = _stack(settings, "encoder", common, rows, lengths["encoder"], has_end["encoder"])
        tokens = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}
        config = VariantSeq2SeqConfig(
            encoder=encoder, decoder=decoder, share_embeddings=one_table, tie_word_embeddings=tied,
            decoder_start_token_id=EOS, **tokens,
        )  # fmt: skip
        ties |= {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"} if one_table else {}
        rules = (
            *_stack_rules("encoder.", "model.encoder.", encoder.norm_placement),
            *_stack_rules("decoder.", "model.decoder.", decoder.norm_placement, is_decoder_of_two=True),
        )
    else:
        decoder.tie_word_embeddings = tied
        config, rules = decoder, _stack_rules("decoder.", "model.", decoder.norm_placement)
    settings.refuse_but(**REFUSED)
    settings.pass_over(*UNREAD)
    if not is_pair:
        settings.drop("encoder_")
    settings.finish()
    return config, (*rules, *HEAD), ties


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    file = _file(path)
    assert file is not None
    try:
        loaded = _content(file)
    except ConversionError as error:
        raise ConversionError(
            f"{file} holds other objects than tensors, plain values and a Namespace, which could run code, or is damaged. "
            "With fairseq, where you trust it: `state = fairseq.checkpoint_utils.load_checkpoint_to_cpu(path)`, then "
            '`torch.save({"model": state["model"], "cfg": OmegaConf.to_container(state["cfg"])}, "checkpoint_best.pt")`.'
        ) from error
    content = Settings(loaded, file)
    state, settings = without_prefix(content.take("model", dict), f"`model` in {file}"), _settings(content)
    content.pass_over(
        "criterion", "optimizer_history", "task_state", "extra_state", "last_optimizer_state", "optimizer", "epoch",
        "batch_offset", "val_loss", "best_loss",
    )  # fmt: skip
    content.refuse_but(shard_metadata=None)
    content.finish()
    config, rules, ties = config_of(settings, state, file)
    # A version was read above, the dummy tells devices, and sinusoids are computed anew by fairseq as well.
    left_out = re.compile(r"(en|de)coder\.(version|embed_positions\.(_float_tensor|weights))")
    state = {name: tensor for name, tensor in state.items() if not left_out.fullmatch(name)}
    missing = [source for copy, source in ties.items() if copy in state and source not in state]
    if missing:
        raise ConversionError(f"{file} lacks {some(missing)}. It is incomplete; fetch it again.")
    return ForeignCheckpoint.of_state(
        "fairseq",
        file,
        config,
        rules,
        state,
        class_name="VariantForCausalLM" if isinstance(config, VariantConfig) else "VariantForConditionalGeneration",
        ties=ties,
        notes=[
            "fairseq begins what it generates with </s>: `generate` of a language model wants it as its first token"
        ]
        if isinstance(config, VariantConfig)
        else [],
        no_tokenizer="No tokenizer is converted: dict.txt lists pieces of words, and what makes them is outside of "
        "fairseq's files",
    )
