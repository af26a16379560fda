#!/usr/bin/env bash
# transformers 5.23.0: CTRL given `inputs_embeds`.
#
# The model multiplies the tensor that it is given by the root of its width in place, so that it is another one afterwards: the
# same call a second time gives other logits, and embeddings that want a gradient (prompt tuning by hand, attribution) raise
# torch's error about leaves. A first call alone is right, and nothing in the signature or the documentation tells.
# The good guess that this defeats: a forward pass leaves its inputs as they are, so that two models may be given one tensor
# and compared. GPT-2 and OPT leave it alone.
#
# Seen: the given embeddings are 32 times what they were after two calls (width 32), and the logits of the two differ.
# 2026-12-01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import CTRLConfig, CTRLLMHeadModel, GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
SIZES = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
for model, factor in ((CTRLLMHeadModel(CTRLConfig(**SIZES, dff=64)), 32**0.5), (GPT2LMHeadModel(GPT2Config(**SIZES)), 1.0)):
    model.eval()
    given = torch.randn(1, 5, 32)
    before = given.clone()
    with torch.no_grad():
        first, second = (model(inputs_embeds=given).logits for _ in range(2))
    now = (given / before).mean().item()
    print(type(model).__name__, "one tensor, two calls:", "same" if torch.equal(first, second) else "other", "logits")
    assert torch.equal(first, second) == (factor == 1.0)
    assert abs(now - factor**2) < 1e-3, now
    print("  the given tensor is now", round(now, 3), "times what it was")
wanted = torch.randn(1, 5, 32, requires_grad=True)
try:
    CTRLLMHeadModel(CTRLConfig(**SIZES, dff=64))(inputs_embeds=wanted)
except RuntimeError as error:
    print("with a gradient:", error)
    assert "leaf Variable" in str(error)
else:
    raise AssertionError("a gradient of given embeddings works now")
PYTHON
