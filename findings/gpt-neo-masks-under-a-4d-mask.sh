#!/usr/bin/env bash
# transformers 5.23.0: GPT-Neo given an attention mask of four dimensions.
#
# A mask (batch, 1, queries, keys) replaces what the other decoders would make: GPT-2 under one of zeros sees all tokens. GPT-Neo
# adds it to the causal mask, or the window, that every layer keeps in a buffer of its own, so that such a mask can hide tokens and
# can never show any: prefix attention, packed rows in another order and bidirectional use all come out as if it had not been
# given, without a word.
# The good guess that this defeats: custom masks mean the same in every decoder that takes them (68 types of which we compared do).
#
# Seen: under a mask of zeros GPT-2's logits change, and GPT-Neo's are those without a mask, bit for bit.
# 2026-12-01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

torch.manual_seed(0)
TOKENS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
NEO = GPTNeoConfig(
    **TOKENS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=3,
    max_position_embeddings=32,
)
GPT2 = GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=32)
ids, shows_all = torch.randint(3, 50, (1, 8)), torch.zeros(1, 1, 8, 8)
for model, ignores in ((GPT2LMHeadModel(GPT2), False), (GPTNeoForCausalLM(NEO), True)):
    model.eval()
    with torch.no_grad():
        without, under = (model(ids, attention_mask=mask).logits for mask in (None, shows_all))
    same = torch.equal(without, under)
    print(type(model).__name__, "under a mask that shows every token:", "as without" if same else "other logits")
    assert same == ignores
PYTHON
