"""That an initialiser reaches every parameter and buffer, whatever memory held before."""

import pytest
import torch

import hf_variants
from hf_variants import VariantConfig
from hf_variants.conversion.skeleton import empty_model
from hf_variants.model.feed_forward import LEARNED_ACTIVATIONS


SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "intermediate_size": 24,
}
# Parameters that no preset has.
OTHERS = {
    "sinks and gates": {"attention_sinks": True, "attention_gate": "headwise"},
    "scale per channel": {"learned_scale_type": "channel"},
    "scale": {"learned_scale_type": "scalar"},
    "dynamic tanh": {"norm_type": "dynamic_tanh", "qk_norm": "per_head"},
    "batchnorm": {"norm_type": "batchnorm", "ffn_sub_norm": True, "norm_placement": "sandwich"},
    "inner norms": {"qk_norm": "per_head", "attention_sub_norm": True, "ffn_sub_norm": True, "norm_unit_offset": True},
    "float32 layernorm": {"norm_type": "layernorm", "norm_casting_mode": "gemma", "norm_bias": False, "qk_norm": "head"},
    "per-head layernorm": {"norm_type": "layernorm", "qk_norm": "per_head", "norm_unit_offset": True},
    **{act: {"hidden_act": act, "ffn_type": "mlp"} for act in LEARNED_ACTIVATIONS},
    "heads": {
        "is_causal": False, "pooler": True, "lm_head_transform": True, "lm_head_bias": True, "lm_head_unread_bias": True,
        "classifier_transform": True, "classifier_transform_norm": True, "type_vocab_size": 2, "task_type_vocab_size": 3,
    },
    "factorised": {"embedding_size": 8, "output_projection": True, "embedding_norm": True},
    "learned positions": {"position_embedding_type": "learned"},
    "stored table": {"position_embedding_type": "sinusoidal", "sinusoidal_table_stored": True},
    "stored rotation": {"rope_table_stored": True, "rope_in_float32": True},
    "rotation in the checkpoint": {"rope_table_in_checkpoint": True},
    "relative": {"position_embedding_type": "relative_bias", "relative_attention_per_layer": True},
}  # fmt: skip


def config_of(name: str) -> VariantConfig:
    if name in OTHERS:
        return VariantConfig(**SMALL, **OTHERS[name])
    return VariantConfig.from_preset(name, **SMALL, **({"num_key_value_heads": 1} if name == "falcon" else {}))


def unreached(model_class: type, config) -> list[str]:
    """Parameters and buffers that still hold what memory held before, or more than they should."""
    model = empty_model(model_class, config).to_empty(device="cpu")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor in tensors.values():
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
    # As `from_pretrained` initialises what a checkpoint lacks.
    model.initialize_weights()
    return [
        name
        for name, tensor in tensors.items()
        if not (tensor.isfinite() if tensor.is_floating_point() else tensor != torch.iinfo(tensor.dtype).min).all()
    ]


@pytest.mark.parametrize("name", [*hf_variants.presets(), *OTHERS])
def test_an_initialiser_reaches_every_parameter(name):
    config = config_of(name)
    head = hf_variants.VariantForCausalLM if config.is_causal else hf_variants.VariantForMaskedLM
    assert unreached(head, config) == []
    assert unreached(hf_variants.VariantForSequenceClassification, config) == []


def test_an_initialiser_reaches_both_stacks():
    stacks = {"encoder": SMALL, "decoder": {**SMALL, "position_embedding_type": "relative_bias"}}
    options = {"final_logits_bias": True, "share_embeddings": False, "unread_shared_embedding": True}
    config = hf_variants.VariantSeq2SeqConfig(**stacks, **options, decoder_start_token_id=1)
    assert unreached(hf_variants.VariantForConditionalGeneration, config) == []


def test_what_is_not_reached_is_seen(monkeypatch):
    monkeypatch.setattr(hf_variants.VariantModel, "_init_weights", lambda self, module: None)
    assert "model.norm.weight" in unreached(hf_variants.VariantForCausalLM, VariantConfig(**SMALL))
