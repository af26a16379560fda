#!/usr/bin/env bash
# transformers 5.23.0: `partial_rotary_factor` in the `rope_parameters` of a model that rotates whole heads, such as Llama.
#
# With `rope_type` default the key has no effect: the model's own function makes frequencies for the whole head. With linear,
# dynamic, yarn or llama3 the shared functions make them, which read the key, so there are fewer frequencies than the attention
# rotates channels: the config loads, the model builds, and the first call raises a RuntimeError about sizes in `apply_rotary`.
# The good guess that this defeats: a key that a class ignores is ignored whatever the rope_type, so that a context can be
# extended (default to yarn) without looking at the other keys.
#
# Seen: default gives the bits of a config without the key; the four others raise.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CONTEXT = {"factor": 2.0, "original_max_position_embeddings": 32}
TYPES = {
    "default": {}, "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "yarn": CONTEXT,
    "llama3": {**CONTEXT, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def logits(**parameters):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **parameters})
    return LlamaForCausalLM(config).eval()(torch.tensor([[1, 2, 3]])).logits


for rope_type, parameters in TYPES.items():
    whole = logits(rope_type=rope_type, **parameters)
    try:
        outcome = torch.equal(logits(rope_type=rope_type, partial_rotary_factor=0.5, **parameters), whole)
    except RuntimeError as error:
        outcome = str(error)
    print(rope_type, outcome)
    assert outcome is True if rope_type == "default" else "must match the size" in outcome
PYTHON
