#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0 on a CPU: `attn_implementation="flex_attention"` in two models with soft-caps.
#
# transformers compiles flex attention once per process. The first model's soft-cap is compiled as a constant; when a second
# model brings another, torch takes the number for one that varies, and inductor's flex attention for CPUs cannot lower a
# soft-cap that is not a constant: the first call of the second model raises an InductorError ("unbacked_bindings"). Each
# model alone runs, in either order, and so does the second after `torch.compiler.reset()`.
# The good guess that this defeats: what was compiled for one model costs another time at most; so that a comparison of two
# configs, or a test suite, may load them one after the other.
#
# Seen: 50.0 runs, 30.0 raises, 50.0 runs again; after a reset 30.0 runs.
# 2026-11-30. Needs a C++ compiler and Python's headers, as torch.compile does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM


def run(softcap):
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, attn_logit_softcapping=softcap,
    )
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("flex_attention")
    try:
        with torch.no_grad():
            model(torch.arange(12)[None])
    except Exception as error:
        return f"{type(error).__name__}: {'unbacked_bindings' in str(error)}"
    return "runs"


seen = {"first": run(50.0), "second": run(30.0), "first again": run(50.0)}
torch.compiler.reset()
seen["second after a reset"] = run(30.0)
print(seen)
assert seen == {
    "first": "runs", "second": "InductorError: True", "first again": "runs", "second after a reset": "runs",
}
PYTHON
