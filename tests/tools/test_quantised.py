"""Models quantised by bitsandbytes on a CPU: what is quantised, what it computes, and QLoRA."""

import peft
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from tests.tools import kinds
from tests.tools.kinds import KINDS, batch, model


pytestmark = pytest.mark.whole

# bitsandbytes' blocks hold 64 values.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


def quantised(folder, kind: str, quantization_config, **options):
    """In training mode: in eval mode bitsandbytes packs 4-bit weights for AVX-512, and gradients stop there."""
    loaded = kinds.MODEL_CLASSES[kind].from_pretrained(folder, quantization_config=quantization_config, **options)
    return loaded.train()


def logits(built, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return built(**batch(kind)).logits.float()


def distance(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    return ((outputs - reference).abs().max() / reference.std()).item()


def check_quantised(built, linear_class: type, dtype: torch.dtype, size: float) -> None:
    """Each linear layer but the LM head is of the class, and stored in `size` bytes per weight."""
    layers = {name: layer for name, layer in built.named_modules() if isinstance(layer, nn.Linear)}
    head = layers.pop("lm_head")
    assert type(head) is nn.Linear
    assert head.weight.dtype.is_floating_point
    for name, layer in layers.items():
        assert type(layer) is linear_class, name
        assert layer.weight.dtype == dtype, name
        assert layer.weight.numel() == layer.in_features * layer.out_features * size, name


def train(wrapped, kind: str) -> None:
    """A few steps lower the loss and reach each trained parameter."""
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    untouched = set(trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.02)
    losses = []
    wrapped.train()
    for _ in range(5):
        loss = wrapped(**batch(kind)).loss
        loss.backward()
        untouched -= {name for name in untouched if trained[name].grad is not None and trained[name].grad.any()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert not untouched


@pytest.mark.tool("QLoRA (4-bit)", package="bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_four_bits(kind, tmp_path):
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    original = model(kind, **SIZES)
    original.save_pretrained(tmp_path / "base")
    base = quantised(tmp_path / "base", kind, FOUR_BITS)
    check_quantised(base, bitsandbytes.nn.Linear4bit, torch.uint8, size=0.5)

    # What a float model with the rounded weights computes.
    rounded = model(kind, **SIZES)
    for name, layer in base.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            rounded.get_submodule(name).weight.data.copy_(values)
    expected = logits(rounded, kind)
    assert distance(expected, logits(original, kind)) > 1e-2
    assert distance(logits(base, kind), expected) < 1e-5

    base.save_pretrained(tmp_path / "quantised")
    assert distance(logits(type(base).from_pretrained(tmp_path / "quantised").train(), kind), expected) < 1e-5

    base = peft.prepare_model_for_kbit_training(base)
    assert base.is_gradient_checkpointing
    options = {"r": 4, "target_modules": "all-linear", "task_type": kinds.TASK_TYPES[kind]}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**options))
    train(wrapped, kind)
    live = logits(wrapped, kind)
    assert distance(live, expected) > 1e-2
    with wrapped.disable_adapter():
        assert distance(logits(wrapped, kind), expected) < 1e-5

    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantised(tmp_path / "base", kind, FOUR_BITS), tmp_path / "adapter")
    assert distance(logits(again.train(), kind), live) < 1e-5

    # Merged into the float model it is exact; merged into 4 bits it is rounded once more, of which PEFT warns.
    exact = peft.PeftModel.from_pretrained(rounded, tmp_path / "adapter").merge_and_unload()
    assert distance(logits(exact, kind), live) < 1e-4
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = again.merge_and_unload()
    check_quantised(merged, bitsandbytes.nn.Linear4bit, torch.uint8, size=0.5)
    assert (logits(merged, kind) - live).std() < 0.5 * live.std()


@pytest.mark.tool("QLoRA (8-bit)", package="bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits(kind, tmp_path):
    import bitsandbytes

    original = model(kind, **SIZES)
    original.save_pretrained(tmp_path / "base")
    base = quantised(tmp_path / "base", kind, EIGHT_BITS)
    check_quantised(base, bitsandbytes.nn.Linear8bitLt, torch.int8, size=1)
    expected = logits(original, kind)
    assert 0 < (logits(base, kind) - expected).std() < 0.05 * expected.std()
    wrapped = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base), peft.LoraConfig(r=4, task_type=kinds.TASK_TYPES[kind])
    )
    train(wrapped, kind)
    live = logits(wrapped, kind)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantised(tmp_path / "base", kind, EIGHT_BITS), tmp_path / "adapter")
    assert distance(logits(again.train(), kind), live) < 1e-5
