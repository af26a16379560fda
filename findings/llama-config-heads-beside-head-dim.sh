#!/usr/bin/env bash
# transformers 5.23.0: `head_dim` beside a width that the number of heads does not divide.
#
# LlamaConfig, Gemma2Config and Gemma3TextConfig raise over it, although the size of a head is given, and their layers take their
# shapes from that alone. MistralConfig and Qwen3Config take the same numbers. So a Llama whose heads or whose width were pruned
# is no `llama` for its own library, and is a `mistral`, which computes the same: whether a shape can be published depends on the
# name it goes by.
# The good guess that this defeats: with `head_dim` given, `hidden_size` and `num_attention_heads` are free of each other.
#
# Seen: three of five classes raise; Mistral's model of that shape runs.
# 2026-12-01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, MistralForCausalLM, Qwen3Config,
)

SHAPE = {
    "vocab_size": 64, "hidden_size": 48, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16,
    "num_hidden_layers": 2, "intermediate_size": 64,
}
refused = set()
for kind in (LlamaConfig, Gemma2Config, Gemma3TextConfig, MistralConfig, Qwen3Config):
    try:
        kind(**SHAPE)
        print(kind.__name__, "takes it")
    except StrictDataclassClassValidationError as error:
        assert "not a multiple of the number of attention heads" in str(error)
        print(kind.__name__, "raises:", str(error).splitlines()[-1].strip())
        refused.add(kind)
assert refused == {LlamaConfig, Gemma2Config, Gemma3TextConfig}
logits = MistralForCausalLM(MistralConfig(**SHAPE))(torch.arange(6)[None]).logits
assert logits.shape == (1, 6, 64)
PYTHON
