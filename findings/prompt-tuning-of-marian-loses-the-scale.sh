#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: under prompt tuning Marian's and Pegasus's encoders get the text without its scale.
#
# Both multiply the rows of their table by sqrt(d_model), in the forward pass of the stack and only where it is given ids. PEFT's prompt
# methods look the text up themselves, with the model's input embedding, and pass `inputs_embeds` with the prompt in front: the words then
# enter the encoder sqrt(d_model) times smaller than they were trained (22.6 at the published 512), beside positions of the old size. The
# decoders, which multiply what they are given as well, are not concerned; nor is M2M-100, whose table multiplies by itself.
# The good guess that this defeats: `get_input_embeddings()(ids)` given as `inputs_embeds` is the same as the ids.
#
# Seen: the factor between a word's row and what the first layer is given of it, without PEFT and with it, at d_model 64: Marian and
# Pegasus 8.0 and 1.0, M2M-100 8.0 and 8.0. No message says so.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model

SIZES = {
    "vocab_size": 60, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "scale_embedding": True, "pad_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
PROMPT = 3
ids = torch.arange(5, 15)[None]
seen = {"Marian": (8.0, 1.0), "Pegasus": (8.0, 1.0), "M2M100": (8.0, 8.0)}

for name, expected in seen.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    head = "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration"
    model = getattr(transformers, head)(config).eval()
    encoder = model.get_encoder()
    rows = model.get_input_embeddings().weight.data[ids]
    given = []
    encoder.layers[0].register_forward_pre_hook(lambda _, args, kwargs: given.append((args or tuple(kwargs.values()))[0]), with_kwargs=True)
    positions = []
    encoder.embed_positions.register_forward_hook(lambda _, args, output: positions.append(output))

    def factor(run, before):
        """Of a word's row in what the first layer is given of the text, `before` tokens after its start."""
        given.clear(), positions.clear()
        with torch.no_grad():
            run(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        words = (given[0] - positions[0])[:, before:]
        return ((words * rows).sum() / rows.pow(2).sum()).item()

    plain = factor(model, 0)
    tuned = factor(get_peft_model(model, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=PROMPT)).eval(), PROMPT)
    print(f"{name}: {plain:.3f} without PEFT, {tuned:.3f} with prompt tuning")
    assert abs(plain - expected[0]) < 1e-3
    assert abs(tuned - expected[1]) < 1e-3
PYTHON
