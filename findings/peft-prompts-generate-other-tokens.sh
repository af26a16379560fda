#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: a stock model with a trained prompt generates tokens that it does not predict itself.
#
# PEFT puts virtual tokens in front at the first step, and knows the first step by a cache that is absent or empty, which it looks for
# as `past_key_values`. 5.24 hands it as `cache`, so that every step is the first one: the prompt enters again before each new token.
# No error and no warning; a forward alone, and training, are right. 5.24 asks for PEFT 0.22 where it loads an adapter itself
# (`model.add_adapter`), but not where PEFT wraps a model, and pip installs the two together.
# The good guess that this defeats: an adapter whose logits are right generates what its logits say.
#
# Seen: in 5.23.0 greedy tokens are those of a loop over forwards; in 5.24.0 other ones, for prefix, prompt and P-tuning alike.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/generate.py" <<'PYTHON'
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
METHODS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig, "P": peft.PromptEncoderConfig}
ids = torch.arange(3, 27).view(2, 12)
equal = {}
for name, method in METHODS.items():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0))
    model = peft.get_peft_model(base, method(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    equal[name] = torch.equal(tokens, expected)
print(sys.argv[1], equal)
assert set(equal.values()) == {sys.argv[1] == "5.23.0"}, equal
PYTHON
for release in 5.23.0 5.24.0; do
	"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 "transformers==$release"
	(cd "$folder" && venv/bin/python generate.py "$release")
done
