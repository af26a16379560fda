#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: `modules_to_save` of a LoraConfig.
#
# A name there stands for every module whose dotted name ends in these characters, also in the middle of a word:
# "norm" copies and trains each `input_layernorm` and `post_attention_layernorm` beside the final `norm`, and "head" is
# `lm_head`. `target_modules` of the same config takes whole components of a name and finds nothing for "proj".
# The good guess that this defeats: both lists of names are matched alike, so that "norm" is the final norm alone.
#
# Seen: three norms trained for "norm", lm_head for "head"; "proj" as a target raises that no module was found.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def adapted(**options):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**options))


def saved(name):
    model = adapted(target_modules=["q_proj"], modules_to_save=[name])
    return sorted(n.split(".")[-4] for n, _ in model.named_parameters() if "modules_to_save" in n)


for name, expected in (("norm", ["input_layernorm", "norm", "post_attention_layernorm"]), ("head", ["lm_head"])):
    seen = saved(name)
    print(f"modules_to_save=[{name!r}] trains {', '.join(seen)}")
    assert seen == expected
try:
    adapted(target_modules=["proj"])
except ValueError as error:
    print(f"target_modules=['proj']: {error}")
else:
    raise AssertionError("found")
PYTHON
