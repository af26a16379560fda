#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: LoRA on the embedding `shared` of T5 or BART trains nothing.
#
# `shared` is the name under which both models keep their table of tokens, it is what `get_input_embeddings` returns and what the
# checkpoint holds. No forward calls it: each stack has an `embed_tokens` of its own, tied to the same weight. An adapter there is
# built, counted as trainable, saved and loaded, and has neither an effect nor a gradient; nothing warns.
# The good guess that this defeats: the module that `get_input_embeddings` names is the one to adapt.
#
# Seen: of an adapter that is not drawn at zero the logits are those of the base model, and alone it leaves nothing to differentiate;
# on `embed_tokens` the logits change.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

T5 = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
BART = BartConfig(
    vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
)
ids = torch.arange(1, 9)[None]
for model_class, config in ((T5ForConditionalGeneration, T5), (BartForConditionalGeneration, BART)):
    for target in ("shared", "embed_tokens"):
        torch.manual_seed(0)
        model = model_class(config).eval()
        assert model.get_input_embeddings() is model.base_model.shared
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=[target], init_lora_weights=False)).eval()
        trainable, _ = adapted.get_nb_trainable_parameters()
        after = adapted(input_ids=ids, decoder_input_ids=ids).logits
        change = ((after - before).abs().max() / before.std()).item()
        print(f"{model_class.__name__}, {target}: {trainable} trainable, logits change by {change:.2g} deviations,",
              "a gradient" if after.requires_grad else "no gradient")
        assert trainable > 0
        assert after.requires_grad == (target == "embed_tokens")
        assert change > 0.1 if target == "embed_tokens" else change < 1e-4
PYTHON
