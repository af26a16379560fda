"""In float16 every native type computes what its stock class computes: layers kept in float32, and values kept finite."""

import random

import pytest
import torch

import hf_variants
from hf_variants.conversion.family import family_of
from hf_variants.model.builder import FLOAT16_LIMITS
from tests.native_rows import all_rows
from tests.parity import hostile_, inputs_of, logits_of, relative_error, set_backend


ROWS = all_rows()
# Of stock classes; the values of the others may be infinite in float16.
KEPT_FINITE = ("t5", "mt5", "umt5", "bart", "mbart", "plbart", "mvp", "marian", "pegasus", "m2m_100", "blenderbot",
               "blenderbot-small")  # fmt: skip


def in_float16(model):
    """The model as transformers loads it in float16."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return type(model).from_pretrained(None, config=model.config, state_dict=weights, dtype=torch.float16).eval()


def stock_and_ours(model_type: str, overflowing: bool = False):
    """
    Both in float16, with the same weights.

    Args:
        overflowing: have a sublayer of the encoder, or a whole block, give values past those of float16, as large as the
            weights themselves can be, where the stock class then limits them.
    """
    row, family = ROWS[model_type], family_of(model_type)
    config = family.config_map.native_class(**row.draw(random.Random(f"{model_type}-0")))
    model = hostile_((row.reference or family.native_class(family.primary))(config)).eval()
    if overflowing:
        encoder = family.config_map.to_variant(config).encoder
        last = f"encoder.layers.{encoder.num_hidden_layers - 1}."
        grown = {
            "sublayers": ("block.0.layer.0.SelfAttention.o.weight",),
            "pre": (f"{last}fc2.weight",),
            "post": (f"{last}final_layer_norm.weight",),
        }[encoder.clamp_in_float16 if encoder.clamp_in_float16 == "sublayers" else encoder.norm_placement]
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(grown):
                    weight.mul_(6e4 / weight.abs().max())
                # Products with the largest values of the encoder are finite again.
                elif name.endswith(("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight")):
                    weight.mul_(1e-4)
    ours = hf_variants.from_native(model)
    return in_float16(model), in_float16(ours)


@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if not row.reference])
def test_logits_in_float16(model_type):
    stock, ours = stock_and_ours(model_type)
    for dtype in (torch.float32, torch.float16):
        sizes = [sum(p.numel() for p in m.parameters() if p.dtype == dtype) for m in (stock, ours)]
        assert sizes[0] == sizes[1], dtype
    batch = inputs_of(stock, 16)["long"]
    set_backend(stock, ours, "eager")
    expected, made = logits_of(stock, batch), logits_of(ours, batch)
    if family_of(model_type).deviations:
        assert relative_error(made, expected) < 0.02
    else:
        assert torch.equal(made, expected)


@pytest.mark.parametrize("model_type", KEPT_FINITE)
def test_large_values(model_type, monkeypatch):
    stock, ours = stock_and_ours(model_type, overflowing=True)
    batch = inputs_of(stock, 16)["long"]
    set_backend(stock, ours, "eager")
    expected = logits_of(stock, batch)
    assert torch.isfinite(expected).all()
    assert torch.equal(logits_of(ours, batch), expected)
    # The values are such that the limit matters.
    for kind in FLOAT16_LIMITS:
        monkeypatch.setitem(FLOAT16_LIMITS, kind, FLOAT16_LIMITS["none"])
    unlimited = in_float16(ours)
    set_backend(stock, unlimited, "eager")
    assert not torch.isfinite(logits_of(unlimited, batch)).all()
