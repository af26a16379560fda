"""What serving engines ask of a model they run by their transformers backend; the engines themselves want a GPU."""

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_variants.model.block import Block

from . import kinds


ENGINE = pytest.mark.tool("vLLM, SGLang: the transformers backend", contract=True)
SERVED = (*kinds.DECODERS, "encoder")


def paged_attention(module, query, key, value, attention_mask, scaling, attention_instances, **kwargs):
    """Attention as an engine computes it: from the module and the config's names, without a mask."""
    assert attention_mask is None
    assert attention_instances[module.layer_idx] == f"cache of layer {module.layer_idx}"
    config, length = module.config, query.shape[2]
    window = config.sliding_window if config.layer_types[module.layer_idx] == "sliding_attention" else length
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (distance >= 0) & (distance < window) if module.is_causal else torch.ones_like(distance, dtype=torch.bool)
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if config.attn_logit_softcapping is not None:
        scores = torch.tanh(scores / config.attn_logit_softcapping) * config.attn_logit_softcapping
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@ENGINE
@pytest.mark.parametrize("kind", SERVED)
@torch.no_grad()
def test_the_base_model_runs_with_an_engines_attention(kind, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", paged_attention)
    base = kinds.model(kind).base_model
    ids = kinds.batch(kind, rows=1)["input_ids"]
    # Before the config, which is shared, names another attention.
    expected = base(ids).last_hidden_state
    served = AutoModel.from_config(base.config, attn_implementation="engine").eval()
    served.load_state_dict(base.state_dict())
    out = served(
        input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False, return_dict=False,
        attention_instances={layer: f"cache of layer {layer}" for layer in range(base.config.num_hidden_layers)},
    )  # fmt: skip
    assert (out[0] - expected).abs().max() < 1e-5 * expected.std()


@ENGINE
@pytest.mark.parametrize("kind", kinds.DECODERS)
@torch.no_grad()
def test_an_engine_can_rebuild_the_head_from_the_config(kind):
    model = kinds.model(kind)
    config, ids = model.config.to_dict(), kinds.batch(kind)["input_ids"]
    logits = model.get_output_embeddings()(model.base_model(ids).last_hidden_state) * config["logit_scale"]
    if config["final_logit_softcapping"] is not None:
        logits = torch.tanh(logits / config["final_logit_softcapping"]) * config["final_logit_softcapping"]
    expected = model(ids).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.std()


@ENGINE
@pytest.mark.parametrize("kind", SERVED)
def test_an_engine_can_take_the_model_apart(kind):
    model = kinds.model(kind)
    assert model._supports_attention_backend
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    (layers,) = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    assert all(isinstance(layer, Block) for layer in layers)
    assert {layer.self_attn.is_causal for layer in layers} == {kind != "encoder"}
    plans = [*model.config.base_model_pp_plan, *model.config.base_model_tp_plan]
    names = {name.replace(".0.", ".*.") for name, _ in model.base_model.named_modules()}
    assert {plan for plan in plans if plan.startswith("layers.*.") or "." not in plan} <= names | {"layers"}
