#!/usr/bin/env bash
# torchao 0.18.0 with peft 0.21.2 and transformers 5.23.0: LoRA on a model in dynamic int8 trains some of its adapters.
#
# A linear layer whose activations are quantised on the way in gives an output without a gradient function, although its input has one.
# Every path through such a layer ends there: adapters before it get none at all (those of queries, whose way leads through the
# output projection), and those that add to the residual stream get what comes back along the stream alone. Training runs, the loss
# falls, and no message says so. With int8 of weights alone every adapter has its gradient.
# The good guess that this defeats: PEFT takes the configuration, its layers are built and counted, so they train.
#
# Seen: without a gradient: LoRA of `q_proj` in both layers under dynamic int8, with one: `down_proj`; weight-only: all of them.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 torchao==0.18.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

CONFIG = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained("model")
ids = torch.arange(1, 9)[None]
for quantisation in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
    model = LlamaForCausalLM.from_pretrained("model", quantization_config=TorchAoConfig(quantisation))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    without = {name.split(".lora_")[0].removeprefix("base_model.model.model.")
               for name, parameter in adapters.items() if parameter.grad is None}
    print(f"{type(quantisation).__name__}: without a gradient {sorted(without) or 'none'}")
    dynamic = isinstance(quantisation, Int8DynamicActivationInt8WeightConfig)
    assert without == ({f"layers.{layer}.self_attn.q_proj" for layer in (0, 1)} if dynamic else set())
    assert all(parameter.grad.any() for name, parameter in adapters.items() if "down_proj" in name)
PYTHON
