#!/usr/bin/env bash
# transformers 5.23.0: a top-level `original_max_position_embeddings` beside `rope_parameters` that have one of their own, in the
# config.json of a class that does not declare the key (Llama with rope type "llama3").
#
# `AutoConfig` loads both as they stand, so the config shows the value that the RoPE parameters give. Building the model
# standardises them once more, and then the top-level value replaces it: the frequencies are others than the config said.
# The good guess that this defeats: what a loaded config shows is what the model computes with.
#
# Seen: 8192 in the config as loaded, 4096 after a model was built of it, and with it other frequencies.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 131072, "rope_parameters": ROPE,
}
seen = {}
for name, extra in {"plain": {}, "beside": {"original_max_position_embeddings": 4096}}.items():
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(PLAIN | extra))
    config = AutoConfig.from_pretrained(name)
    loaded = config.rope_parameters["original_max_position_embeddings"]
    model = AutoModelForCausalLM.from_config(config)
    built = model.config.rope_parameters["original_max_position_embeddings"]
    seen[name] = (loaded, built, model.model.rotary_emb.inv_freq)
    print(name, "as loaded:", loaded, "after building:", built)
assert seen["plain"][:2] == (8192, 8192)
assert seen["beside"][:2] == (8192, 4096)
assert not torch.equal(seen["plain"][2], seen["beside"][2])
PYTHON
