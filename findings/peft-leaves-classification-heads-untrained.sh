#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: with the task type of sequence classification some new heads are neither trained nor saved.
#
# PEFT trains and saves a head by two names, `classifier` and `score`. BART's and T5's is called `classification_head`, so all of it
# stays as it was drawn; of ModernBERT's the first layer does (`head`). A model made from a base checkpoint draws those anew each
# time, and an adapter that is loaded onto it meets other numbers than it was trained with. Nothing warns. Names in `modules_to_save` are
# added to PEFT's own, and all is saved.
# The good guess that this defeats: `task_type="SEQ_CLS"` is what makes PEFT take care of a new head.
#
# Seen: parameters of the head that are frozen, and how far the logits of a saved adapter on a new model of the same base are from the
# live ones: none and 0 for BERT, RoBERTa and DistilBERT; 4 of 4 for BART and T5, some for ModernBERT, and other logits.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel, AutoModelForSequenceClassification, BartConfig, BertConfig, DistilBertConfig, ModernBertConfig, RobertaConfig,
    T5Config,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OF_BART = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
}
OF_T5 = {
    "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
# The config, what to adapt, and the modules of the head that stay frozen.
CASES = [
    (BertConfig(**SIZES), "query", []),
    (RobertaConfig(**SIZES), "query", []),
    (BartConfig(**OF_BART), "q_proj", ["classification_head"]),
    (T5Config(**OF_T5), "q", ["classification_head"]),
    (DistilBertConfig(vocab_size=50, dim=32, hidden_dim=32, n_layers=1, n_heads=2), "q_lin", []),
    (ModernBertConfig(**SIZES, **SPECIAL), "Wqkv", ["head"]),
]
# With the end of T5's sequences and that of BART's.
ids = torch.tensor([[5, 6, 7, 8, 1, 2]])


def classifier(seed):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)


for config, target, untrained in CASES:
    for names in ([], untrained):
        shutil.rmtree("base", ignore_errors=True)
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained("base")
        options = LoraConfig(task_type="SEQ_CLS", target_modules=[target], modules_to_save=list(names) or None)
        model = classifier(1)
        new = {name for name, _ in model.named_parameters()} - {
            name for name, _ in model.named_parameters()
            if name.startswith(("bert.", "roberta.", "model.", "transformer.", "distilbert."))
        }
        adapted = get_peft_model(model, options)
        saved = {name.replace("base_model.model.", "").replace("modules_to_save.default.", "")
                 for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        frozen = new - saved
        adapted.eval().save_pretrained("adapter")
        loaded = PeftModel.from_pretrained(classifier(2), "adapter").eval()
        difference = (loaded(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max().item()
        print(f"{config.model_type}, modules_to_save={names or None}: {len(frozen)} of {len(new)} frozen, "
              f"reloaded logits differ by {difference:.3g}")
        if names == untrained:
            assert not frozen and difference < 1e-6
        else:
            assert {name.split(".")[0] for name in frozen} == set(untrained) and difference > 1e-3
        if not untrained:
            break
PYTHON
