#!/usr/bin/env bash
# transformers 5.23.0: RobertaForCausalLM and its relatives (XLM-RoBERTa), called and in `generate`.
#
# These classes count positions from the tokens' ids and begin behind the padding index, at 2, if they are given none: so they
# were trained, and so a call computes. `generate` makes `position_ids` from the attention mask for every decoder whose forward
# takes them, and those begin at 0: the prompt is read with two rows of the table that training never used (0, and 1, the
# padding's), and every token is looked up two rows too low. Nothing warns, and the text is merely worse.
# The good guess that this defeats: the first scores of `generate` are the logits that a call gives for the prompt, so that
# either can prove a converted decoder.
#
# Seen: a call looks up rows 2 to 9, `generate` rows 0 to 7 and then 8; the scores are 0.9 and 3.5 of the logits' spread apart.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import RobertaConfig, RobertaForCausalLM, XLMRobertaConfig, XLMRobertaForCausalLM

for config_class, model_class in ((RobertaConfig, RobertaForCausalLM), (XLMRobertaConfig, XLMRobertaForCausalLM)):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, is_decoder=True,
        max_position_embeddings=40, initializer_range=0.5,
    )
    model = model_class(config).eval()
    rows = []
    table = model.base_model.embeddings.position_embeddings
    table.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].flatten().tolist()))
    prompt = torch.randint(5, 60, (1, 8))
    with torch.no_grad():
        called = model(prompt).logits[0, -1]
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )
    apart = ((called - made.logits[0][0]).abs().max() / called.std()).item()
    print(model_class.__name__, rows, f"{apart:.2f}")
    assert rows == [list(range(2, 10)), list(range(8)), [8]]
    assert apart > 0.5
PYTHON
