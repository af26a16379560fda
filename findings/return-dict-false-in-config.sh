#!/usr/bin/env bash
# transformers 5.23.0: a config that says `return_dict: false`, as many published in 2020 and 2021 do.
#
# Some models (BERT's base model) return a tuple for it. Language-model heads of Llama and GPT-2 raise an AttributeError on
# every call instead, because the head reads fields of what its own base model now returns as a tuple, and an explicit
# `return_dict=True` in the call does not help. The same value as an argument, over a config without it, works.
# The good guess that this defeats: the key is either ignored or means what the argument of the same name means, and the
# argument wins.
#
# Seen: Llama and GPT-2 raise with no argument, with False and with True; BERT gives tuple, tuple, an output object.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ids = torch.tensor([[1, 2, 3]])
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OF_GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}


def outcomes(model):
    for given in ({}, {"return_dict": False}, {"return_dict": True}):
        try:
            yield "tuple" if isinstance(model(ids, **given), tuple) else "output"
        except AttributeError:
            yield "AttributeError"


for model_class, config_class, sizes, expected in (
    (LlamaForCausalLM, LlamaConfig, SIZES, ["AttributeError"] * 3),
    (GPT2LMHeadModel, GPT2Config, OF_GPT2, ["AttributeError"] * 3),
    (BertModel, BertConfig, SIZES, ["tuple", "tuple", "output"]),
):
    seen = list(outcomes(model_class(config_class(**sizes, return_dict=False)).eval()))
    print(model_class.__name__, seen)
    assert seen == expected
    assert isinstance(model_class(config_class(**sizes)).eval()(ids, return_dict=False), tuple)
PYTHON
