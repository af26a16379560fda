#!/usr/bin/env bash
# hf-mem 0.5.6: the cache of a model all of whose layers have a window (Mistral 7B v0.1).
#
# Its comment says that in "a pure sliding-window model" layers stay capped at the window. It looks for windows in `layer_types`
# and `sliding_window_pattern` alone, and a config as Mistral's, with `sliding_window` for all layers, has neither: every layer
# counts as full, and `sliding_window` is read and has no effect. At 32,768 tokens and a window of 4,096 that is 8 times what
# transformers' DynamicCache keeps (4,095 tokens a layer). The same config with `layer_types` written out is capped.
# The good guess that this defeats: `sliding_window` in a config without `layer_types` is the window of every layer.
#
# Seen: 4,294,967,296 bytes, and 536,870,912 with `layer_types`.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hf-mem==0.5.6
cd "$folder"
venv/bin/python - <<'PYTHON'
from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size

# As the config.json on the Hub has it.
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": 4096,
    "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "vocab_size": 32000,
}
written_out = MISTRAL | {"layer_types": ["sliding_attention"] * 32}
whole, capped = (compute_safetensors_kv_cache_size(config, "BF16", 32768) for config in (MISTRAL, written_out))
print(whole, capped)
per_token = 2 * 32 * 8 * 128 * 2
assert whole == per_token * 32768
assert capped == per_token * 4096
assert whole == 8 * capped
PYTHON
