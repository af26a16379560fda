#!/usr/bin/env bash
# transformers 5.23.0: `resize_token_embeddings(n, mean_resizing=False)` of MarianMTModel.
#
# New rows are drawn around the mean of the old ones unless `mean_resizing` is False, which asks for the model's usual
# initialisation. Marian's own method between the two takes the argument and does not hand it on, so its new rows are always
# drawn around the mean. BART and Pegasus, whose code it shares otherwise, follow the argument.
# The good guess that this defeats: an argument in a signature has its effect in every class, so that two seq2seq models
# compared from "fresh rows" start alike.
#
# Seen: with all old rows at 5.0 the new rows are at 5.0 by default everywhere; with False near 0.0 in BART and Pegasus, 5.0 in
# Marian.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import BartForConditionalGeneration, MarianMTModel, PegasusForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
SIZES = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
    "pad_token_id": 1, "decoder_start_token_id": 1,
}


def new_rows(model_class, **options):
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(5.0)
    model.resize_token_embeddings(54, **options)
    return model.get_input_embeddings().weight[50:].mean().item()


for model_class in (BartForConditionalGeneration, PegasusForConditionalGeneration, MarianMTModel):
    usual, asked = new_rows(model_class), new_rows(model_class, mean_resizing=False)
    print(model_class.__name__, round(usual, 2), round(asked, 2))
    assert abs(usual - 5.0) < 0.1
    assert abs(asked - (5.0 if model_class is MarianMTModel else 0.0)) < 0.1
PYTHON
