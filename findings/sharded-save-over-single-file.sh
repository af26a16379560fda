#!/usr/bin/env bash
# transformers 5.23.0: `save_pretrained` with shards into a folder that holds a model in one file.
#
# The new shards and their index are written, and the old model.safetensors is left where it is. `from_pretrained` then takes
# the single file: what was just saved is not what is loaded, without a word. (The other way round the old shards go.)
# The good guess that this defeats: after a save into a folder, the folder is the model that was saved.
#
# Seen: the model loaded after the second save has the weights of the first.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)
first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
first.save_pretrained("model")
second.save_pretrained("model", max_shard_size="10KB")
print(sorted(path.name for path in Path("model").iterdir()))
loaded = LlamaForCausalLM.from_pretrained("model")
same = {name: torch.equal(loaded.lm_head.weight, model.lm_head.weight) for name, model in (("first", first), ("second", second))}
print("the loaded weights are those of:", same)
assert Path("model/model.safetensors.index.json").is_file()
assert same == {"first": True, "second": False}
PYTHON
