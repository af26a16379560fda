#!/usr/bin/env bash
# CTranslate2 4.8.5 beside transformers 5.23.0: converting a BERT, BART or GPT-NeoX that was made with this transformers.
#
# The converter reads `position_embedding_type`, `normalize_before` and `rotary_pct` off the config. The config classes have none
# of them any more. An old config.json of BERT or BART still brings them, as keys that no class knows, so a published checkpoint
# converts and one that was made (or exported) today does not, until the key is written to its config.json. GPT-NeoX's class
# turns `rotary_pct` into a RoPE parameter while it reads the file, so none converts, no Pythia either.
# The good guess that this defeats: a converter that takes the published checkpoint of a type takes the type, and what
# `save_pretrained` writes is what the converter reads.
#
# Seen: AttributeError for all three; with the one key in config.json BERT and BART convert, GPT-NeoX raises the same.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import BartForConditionalGeneration, BertModel, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
PLAIN = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TWO = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}
WORDS = {f"w{number}": number for number in range(50)}


def convert(folder):
    try:
        TransformersConverter(folder).convert(f"{folder}-converted", force=True)
    except AttributeError as error:
        return str(error)
    return "converted"


for model_class, sizes, key, default, converts in (
    (BertModel, PLAIN, "position_embedding_type", "absolute", True),
    (BartForConditionalGeneration, TWO, "normalize_before", False, True),
    (GPTNeoXForCausalLM, PLAIN, "rotary_pct", 0.25, False),
):
    folder = model_class.__name__
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model_class(model_class.config_class(**sizes, **special)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w3"))
    names = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    without = convert(folder)
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: default}))
    given = convert(folder)
    print(folder, "|", without, "|", given)
    assert key in without and given == ("converted" if converts else without)
PYTHON
