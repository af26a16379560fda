#!/usr/bin/env bash
# transformers 5.23.0: a decoder taken out of an encoder-decoder has a cache of its encoder's depth.
#
# BART's relatives name the depth of each stack, and `num_hidden_layers`, which a cache is made for, is the encoder's. As
# BlenderbotForCausalLM the published Blenderbot (2 layers in the encoder, 12 in the decoder) stops at its third layer; where the
# encoder is deeper, as in the distilled ones, the cache has layers that nothing fills, and all goes well. The whole model has both.
# The good guess that this defeats: `num_hidden_layers` of a config counts the layers of the model that was loaded from it.
#
# Seen: IndexError from generate with a cache for 2 and 12 layers; tokens equal with and without a cache for 12 and 2.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import BartConfig, BartForCausalLM, BlenderbotConfig, BlenderbotForCausalLM, BlenderbotForConditionalGeneration

SIZES = {
    "vocab_size": 50, "d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}
ids = torch.arange(3, 9)[None]


def tokens(model, **options):
    return model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options).tolist()


for model_class, config_class in ((BlenderbotForCausalLM, BlenderbotConfig), (BartForCausalLM, BartConfig)):
    for encoder, decoder in ((2, 12), (12, 2)):
        model = model_class(config_class(**SIZES, encoder_layers=encoder, decoder_layers=decoder)).eval()
        assert model.config.num_hidden_layers == encoder
        expected = tokens(model, use_cache=False)
        try:
            found = "equal" if tokens(model) == expected else "other tokens"
        except IndexError as error:
            found = f"IndexError: {error}"
        print(f"{model_class.__name__}, {encoder} and {decoder} layers: {found}")
        assert found == "equal" if encoder > decoder else found.startswith("IndexError")
whole = BlenderbotForConditionalGeneration(BlenderbotConfig(**SIZES, encoder_layers=2, decoder_layers=12)).eval()
assert tokens(whole) == tokens(whole, use_cache=False)
PYTHON
