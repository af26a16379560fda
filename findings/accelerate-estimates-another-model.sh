#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.23.0: `accelerate estimate-memory` of an untied Llama and of T5.
#
# It builds the model with AutoModel, whatever `architectures` says, so that a Llama's untied LM head is left out (6.5 % of
# Llama 3 8B), and under `init_empty_weights`, which makes each parameter anew as it is registered, so that tables that T5 ties are
# two or three: its one embedding counts once for each place. Nothing says either. The same classes, built on the meta device by
# torch, have as many parameters as the checkpoint.
# The good guess that this defeats: the estimate is of the weights of the repository that was named, or of the class in
# `architectures`.
#
# Seen: Llama 3,844,384 (32 of them values of a buffer) of 4,868,352 parameters, T5 10,418,176 of 8,370,176.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
from types import SimpleNamespace

import torch
from accelerate.commands import estimate
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

# What it asks the Hub for first: that the repository is there, and whose it is.
estimate.verify_on_hub = lambda *_: SimpleNamespace(config={}, library_name="transformers")
LLAMA = LlamaConfig(
    vocab_size=4000, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=704, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)
T5 = T5Config(
    vocab_size=4000, d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8,
    architectures=["T5ForConditionalGeneration"],
)
seen = []
for name, config, model_class in (("llama", LLAMA, LlamaForCausalLM), ("t5", T5, T5ForConditionalGeneration)):
    config.save_pretrained(name)
    model = estimate.create_empty_model(f"./{name}", "transformers")
    size, _ = estimate.calculate_maximum_sizes(model)
    with torch.device("meta"):
        built = model_class(config)
    seen.append((size // 4, built.num_parameters()))
    print(name, "said", size // 4, "built", built.num_parameters())
(llama, whole_llama), (t5, whole_t5) = seen
assert whole_llama - (llama - 32) == 4000 * 256
# Two times more than there is.
assert t5 - whole_t5 == 2 * 4000 * 256
PYTHON
