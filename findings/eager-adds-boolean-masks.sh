#!/usr/bin/env bash
# transformers 5.23.0: a 4D attention mask of booleans masks nothing where attention is eager.
#
# A mask with four dimensions is handed on to the attention as it is. sdpa reads booleans as what a query sees; eager attention adds
# them to the scores, where true is 1 and false is 0: each token sees the whole sequence, the future with it, and no message says so.
# The classes that have eager attention alone (MPT, CodeGen, GPT-J, XGLM) know no other way, and `output_attentions=True` or a soft-cap
# is reason enough to choose it elsewhere.
# The good guess that this defeats: a mask means the same under every attention implementation, and booleans are the safe dtype for it,
# as 2D masks may have it and sdpa's documentation asks for it.
#
# Seen: with a causal mask of booleans Llama's logits are its own under sdpa, and differ by more than a standard deviation under eager;
# so do MPT's. An additive mask is right under both.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

LLAMA = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
MPT = MptConfig(vocab_size=50, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
ids = torch.arange(1, 9)[None]
seen = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def far_off(model_class, config, implementation):
    """How far the logits under each mask are from those without one, in standard deviations."""
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = model(ids).logits
    masks = {"booleans": seen, "additive": additive}
    return {name: ((model(ids, attention_mask=mask).logits - expected).abs().max() / expected.std()).item()
            for name, mask in masks.items()}


found = {
    "Llama, sdpa": far_off(LlamaForCausalLM, LLAMA, "sdpa"),
    "Llama, eager": far_off(LlamaForCausalLM, LLAMA, "eager"),
    "MPT": far_off(MptForCausalLM, MPT, "eager"),
}
for name, distances in found.items():
    print(name, {mask: round(distance, 4) for mask, distance in distances.items()})
    assert distances["additive"] < 1e-3
    assert distances["booleans"] < 1e-3 if name == "Llama, sdpa" else distances["booleans"] > 1
PYTHON
