#!/usr/bin/env bash
# transformers 5.24.0: a class of one's own, with `past_key_values` in its forward, generates without its past.
#
# 5.24 calls the cache `cache`. Outputs translate the older name, and so do transformers' own forwards; `generate` hands every model
# the new one. A forward as custom code has it, with `past_key_values` and `**kwargs`, takes it among the latter and sees none: each
# step after the first computes one token alone, and other text comes out, without an error. (Without `**kwargs` it is a TypeError.)
# The one warning, that the older name is deprecated, says it of the output.
# The good guess that this defeats: a renamed argument that is deprecated until 5.40 still arrives under its older name.
#
# Seen: in 5.23.0 tokens with and without a cache are equal; in 5.24.0 they differ, and the decoding steps are given no cache.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/generate.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Own(LlamaForCausalLM):
    """As published code is written: the cache by its name, and whatever else."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        if past_key_values is None and input_ids.shape[1] == 1:
            self.steps_without_past += 1
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache,
        )


torch.manual_seed(0)
model = Own(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
model.steps_without_past = 0
options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
ids = torch.arange(1, 9)[None]
without = model.generate(ids, use_cache=False, **options)
try:
    cached = model.generate(ids, **options)
    outcome = "equal" if torch.equal(cached, without) else "other tokens"
except RuntimeError as error:
    outcome = f"{type(error).__name__}: {error}"
print(f"{sys.argv[1]}: {outcome}, {model.steps_without_past} of 11 steps without a past")
expected = (True, 0) if sys.argv[1] == "5.23.0" else (False, 11)
assert (outcome == "equal", model.steps_without_past) == expected, outcome
PYTHON
for release in 5.23.0 5.24.0; do
	"$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$release"
	(cd "$folder" && venv/bin/python generate.py "$release")
done
