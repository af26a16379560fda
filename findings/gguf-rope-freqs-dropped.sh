#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: `from_pretrained(folder, gguf_file=...)` of a Llama file with a `rope_freqs.weight`.
#
# llama.cpp stores the rescaled RoPE of Llama 3.1 and later as that tensor, the divisors of the frequencies, and writes no
# `rope.scaling` keys. The loader has no place for the tensor and says nothing: the model comes back with plain RoPE.
# The good guess that this defeats: a GGUF file that loads without a warning is the model it was written from.
#
# Seen: the two files below, with and without the tensor, give the same `inv_freq`, and `rope_type` is "default" for both.
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

WIDTH, HEADS, FFN, VOCAB = 32, 4, 64, 64
DIVISORS = np.array([1.0, 1.0, 4.0, 8.0], dtype=np.float32)


def write(path, divisors):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([1] * VOCAB)
    shapes = {
        "token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (FFN, WIDTH), "blk.0.ffn_up": (FFN, WIDTH), "blk.0.ffn_down": (WIDTH, FFN),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


models = {}
for name, divisors in {"plain": None, "rescaled": DIVISORS}.items():
    write(f"{name}.gguf", divisors)
    models[name] = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf")
frequencies = {name: model.model.rotary_emb.inv_freq for name, model in models.items()}
print({name: model.config.rope_parameters for name, model in models.items()})
assert models["rescaled"].config.rope_parameters["rope_type"] == "default"
assert torch.equal(frequencies["plain"], frequencies["rescaled"])
print("the divisors of the file had no effect:", frequencies["rescaled"].tolist())
PYTHON
