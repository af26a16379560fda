"""Where weights lie: the verdict of `verify` does not depend on it, and moving them changes nothing else."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_variants
from hf_variants.conversion import verify
from hf_variants.conversion.memory import ALIGNMENT, lay_alike
from tests.parity import hostile_


ROOT = Path(__file__).resolve().parents[1]
OFFSETS = range(8, ALIGNMENT, 8)


def shifted(model, offset):
    """A copy whose parameters and buffers begin this many bytes behind the border, ties kept."""
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        size = tensor.numel() * tensor.element_size()
        memory = torch.empty(size + 2 * ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT + offset
        tensor.data = memory[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.data)
    return model


def classifier():
    """Its pooler multiplies one row, of the one sequence that a classifier is tried on."""
    config = BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96,
    )  # fmt: skip
    return hostile_(BertForSequenceClassification(config)).eval()


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def verdicts() -> list[bool]:
    native = classifier()
    ours = hf_variants.from_native(native)
    return [verify(native, shifted(ours, offset), progress=False).ok for offset in OFFSETS]


def test_the_verdict_does_not_depend_on_where_weights_lie():
    """On the code path of MKL on which it matters most, whatever this CPU is."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from tests import test_memory; assert all(test_memory.verdicts())"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.parametrize("offset", OFFSETS)
def test_models_are_compared_where_fresh_weights_lie_and_left_where_they_were(offset):
    native = classifier()
    ours = shifted(hf_variants.from_native(native), offset)
    before, seen = [tensor.data_ptr() for tensor in tensors_of(ours)], set()
    ours.register_forward_pre_hook(
        lambda model, _: seen.update(tensor.data_ptr() % ALIGNMENT for tensor in tensors_of(model))
    )
    assert verify(native, ours, progress=False).ok
    assert seen == {0}
    assert [tensor.data_ptr() for tensor in tensors_of(ours)] == before


def test_identity_values_and_ties_stay():
    config = hf_variants.VariantConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = shifted(hostile_(hf_variants.VariantForCausalLM(config)), 24)
    # Two tensors of one memory that are not one parameter.
    model.model.norm.weight.data = model.model.layers[0].mlp_pre_norm.weight.data
    parameters, values = list(model.parameters()), {name: t.clone() for name, t in model.state_dict().items()}
    put_back = lay_alike(model)
    assert all(before is after for before, after in zip(parameters, model.parameters(), strict=True))
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors_of(model))
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    assert torch.equal(model.model.norm.weight, model.model.layers[0].mlp_pre_norm.weight)
    put_back()
    assert torch.equal(model.model.norm.weight, values["model.norm.weight"] + 1.0)
    assert torch.equal(model.model.norm.weight, model.model.layers[0].mlp_pre_norm.weight)
