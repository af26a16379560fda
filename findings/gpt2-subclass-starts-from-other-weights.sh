#!/usr/bin/env bash
# transformers 5.23.0: the initial weights of a class that is derived from GPT2Model outside the package.
#
# GPT-2 scales the output projections of both sublayers by 1/sqrt(2 * layers). `_init_weights` does so when it is called with the
# module that holds `c_proj`, which has no tensors of its own. For a class whose module is not in the package (a subclass in a
# script, remote code) the loader asks first whether all own tensors of a module have been set already, and all of none have.
# The good guess that this defeats: a subclass without a body is the class, and `_init_weights` is called for every module.
#
# Seen: with 8 layers the standard deviation of `c_proj` is 0.005 in GPT2Model, and 0.020 in its empty subclass.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import GPT2Config, GPT2Model


class Derived(GPT2Model):
    pass


LAYERS = 8
config = GPT2Config(vocab_size=50, n_embd=64, n_layer=LAYERS, n_head=4)
ratios = {}
for model_class in (GPT2Model, Derived):
    torch.manual_seed(0)
    model = model_class(config)
    spread = {
        name: torch.stack([parameter.std() for other, parameter in model.named_parameters() if other.endswith(name)]).mean().item()
        for name in ("attn.c_proj.weight", "mlp.c_proj.weight", "mlp.c_fc.weight")
    }
    print(model_class.__name__, {name: round(value, 4) for name, value in spread.items()})
    ratios[model_class] = [value / config.initializer_range for value in spread.values()]
expected = (2 * LAYERS) ** -0.5
assert all(abs(ratio - expected) < 0.02 for ratio in ratios[GPT2Model][:2])
assert all(abs(ratio - 1.0) < 0.05 for ratio in ratios[Derived])
PYTHON
