#!/usr/bin/env bash
# transformers 5.23.0: Trainer's gradient accumulation multiplies the loss, and the gradients, of BERT, T5 and others by its steps.
#
# Trainer counts the labels of all micro-batches and passes `num_items_in_batch` to models that take it, which then divide by that count; for
# others it divides by the number of steps. Which is which it reads off `forward`'s signature: whoever takes `**kwargs` is thought to
# divide. BERT's and T5's heads take `**kwargs` for their attention, hand nothing of it to their loss, and return the mean of each
# micro-batch: nobody divides, and the sum of the means is what is logged and differentiated. With clipping by norm or under Adam it
# does not show in the result at once, but clipping sets in at a fraction of its bound, and plain SGD takes steps that many times larger.
# The good guess that this defeats: the same data in one large batch or in four accumulated ones trains alike, as documented, since the fix
# of accumulation in 2024.
#
# Seen: logged losses of the same eight rows, all of one length, in 1, 2 and 4 accumulated steps: Llama 4.1 each time; BERT 4.1, 8.2, 16.4;
# T5 5.0, 9.9, 19.8; the norms of the gradients 1.4, 2.8, 5.6 and 1.6, 3.1, 6.3.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import (
    BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments,
    set_seed,
)

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "BERT": (BertForMaskedLM, BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "T5": (T5ForConditionalGeneration, T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                                                 dropout_rate=0.0, decoder_start_token_id=0)),
}
rows = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
data = [{"input_ids": row, "labels": row} for row in rows]
for name, (model_class, config) in MODELS.items():
    logged = {}
    for steps in (1, 2, 4):
        set_seed(0)
        arguments = TrainingArguments(
            "out", per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, max_steps=1, logging_steps=1,
            max_grad_norm=1e9, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )
        trainer = Trainer(model_class(config), arguments, train_dataset=data)
        trainer.train()
        logged[steps] = next((float(entry["loss"]), float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry)
    print(name, {steps: f"loss {loss:.2f}, gradient norm {norm:.2f}" for steps, (loss, norm) in logged.items()})
    for steps in (2, 4):
        for now, once in zip(logged[steps], logged[1]):
            assert abs(now / once - (1 if name == "Llama" else steps)) < 0.02
PYTHON
