#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: LoRA on a tied embedding with `ensure_weight_tying=True`, then `merge_and_unload`.
#
# The option makes one adapter serve the embedding and the head, and while the adapter is live each of the two adds its
# product once. Merging visits both layers, which are one tensor by then, and adds the product twice to it.
# The good guess that this defeats: a merged model computes what the live one did, the more so with the option that is
# there for tied weights.
#
# Seen: the merged weight is the base plus 2.0 times the product, exactly; logits are off by more than a tenth of their spread.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True
)
base = LlamaForCausalLM(config).eval()
weight = base.lm_head.weight.detach().clone()
model = get_peft_model(base, LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, r=4, lora_alpha=4)).eval()
for name, parameter in model.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.1)
layer = next(module for name, module in model.named_modules() if name.endswith("embed_tokens"))
product = layer.get_delta_weight("default").detach().clone()
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    live = model(input_ids=ids).logits
    merged_model = model.merge_and_unload()
    merged = merged_model(input_ids=ids).logits
factor = ((merged_model.lm_head.weight - weight) * product).sum() / (product * product).sum()
off = ((merged - live).abs().max() / live.std()).item()
print(f"the product was added {factor.item():.4f} times; logits off by {off:.2f} standard deviations")
assert abs(factor.item() - 2) < 1e-3
assert off > 0.1
PYTHON
