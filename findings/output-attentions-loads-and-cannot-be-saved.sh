#!/usr/bin/env bash
# transformers 5.23.0: a config.json with `"output_attentions": true`.
#
# The file loads, and the model is built with sdpa, as always when nothing is asked for. Its calls return an empty tuple for
# the attentions, without a warning. What fails is saving: the config is checked then, and attentions are refused beside sdpa, so
# that a training run goes well until its first checkpoint. With `attn_implementation="eager"` it returns and saves.
# The good guess that this defeats: a config that came from a file can be written to a file, unchanged.
#
# Seen: loads; 0 attentions; StrictDataclassClassValidationError from save_pretrained; with eager 1 attention, and it saves.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
file = Path("model/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"output_attentions": True}))

seen = {}
for options in ({}, {"attn_implementation": "eager"}):
    model = AutoModelForCausalLM.from_pretrained("model", **options)
    attentions = len(model(torch.tensor([[1, 2, 3]])).attentions)
    try:
        model.save_pretrained("again")
        outcome = "saved"
    except Exception as error:
        outcome = type(error).__name__
    backend = model.config._attn_implementation
    print(backend, attentions, outcome)
    seen[backend] = attentions, outcome
assert seen == {"sdpa": (0, "StrictDataclassClassValidationError"), "eager": (1, "saved")}
PYTHON
