#!/usr/bin/env bash
# transformers 5.23.0: whether a classifier's head is quantised depends on its having a bias.
#
# Quantisers leave the output embedding and the last module in floats, "for numerical stability". The last module is taken from
# the name of the last parameter, without ".weight" at its end: of a head with a bias that name ends in ".bias", which names no
# module, so the head is quantised (BERT, RoBERTa, DistilBERT, ModernBERT, every head of token classification and question
# answering). Without a bias (Llama's, Gemma's score) it stays. A head that is still to be trained is then frozen, in integers.
# The good guess that this defeats: heads are treated alike, and `modules_to_not_convert` is needed for other modules only.
#
# Seen, with torchao's int8 weight-only: BERT's and DistilBERT's classifiers and Llama's token classifier quantised, Llama's
# sequence classifier in floats; by its name in `modules_to_not_convert`, BERT's in floats as well. bitsandbytes asks the same.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 torchao==0.18.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig,
    LlamaForSequenceClassification, LlamaForTokenClassification, TorchAoConfig,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OF_DISTILBERT = {"vocab_size": 50, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}


def is_quantised(model_class, config, head, **options):
    model_class(config).save_pretrained("model")
    quantisation = TorchAoConfig(Int8WeightOnlyConfig(), **options)
    loaded = model_class.from_pretrained("model", quantization_config=quantisation)
    return type(getattr(loaded, head).weight) is not torch.nn.Parameter


bert = BertForSequenceClassification, BertConfig(**SIZES), "classifier"
seen = {
    "BERT": is_quantised(*bert),
    "DistilBERT": is_quantised(DistilBertForSequenceClassification, DistilBertConfig(**OF_DISTILBERT), "classifier"),
    "Llama, tokens": is_quantised(LlamaForTokenClassification, LlamaConfig(**SIZES), "score"),
    "Llama": is_quantised(LlamaForSequenceClassification, LlamaConfig(**SIZES, pad_token_id=0), "score"),
    "BERT, by name": is_quantised(*bert, modules_to_not_convert=["classifier"]),
}
print(seen)
assert seen == {
    "BERT": True, "DistilBERT": True, "Llama, tokens": True, "Llama": False, "BERT, by name": False,
}
PYTHON
