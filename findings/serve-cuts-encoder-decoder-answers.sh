#!/usr/bin/env bash
# transformers 5.23.0: `transformers serve` cuts the answers of encoder-decoders, unless they are streamed.
#
# What `generate` gives is cut by the length of the prompt before it becomes an answer, which is right for a decoder, whose
# output starts with the prompt. An encoder-decoder's output has no prompt in it: the answer to /v1/chat/completions and
# /v1/completions lacks its first tokens, as many as the prompt has less one, and is empty for a longer prompt. `usage` counts
# what is left, and nothing is logged. The same request with `stream: true` gives all of it.
# The good guess that this defeats: streaming changes when text arrives, not which.
#
# Seen: a BART that writes w10 to w21, asked with 4 tokens: "w13 ... w21"; with 20 tokens: ""; streamed, all twelve words.
# 2026-11-30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 'transformers[serving]==5.23.0'
cd "$folder"
mkdir cache
HF_HUB_OFFLINE=1 HF_HUB_CACHE="$folder/cache" venv/bin/python -W ignore - <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
import urllib.request

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, PreTrainedTokenizerFast

# Each position of the decoder has a token of its own: what it writes does not depend on what it is asked.
words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, 64))]
model = BartForConditionalGeneration(BartConfig(
    vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
    encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
))
for parameter in model.parameters():
    parameter.data.zero_()
decoder = model.model.decoder
for norm in (decoder.layernorm_embedding, decoder.layers[0].self_attn_layer_norm, decoder.layers[0].encoder_attn_layer_norm,
             decoder.layers[0].final_layer_norm):
    norm.weight.data.fill_(1)
model.model.shared.weight.data.copy_(torch.eye(64) * 0.1)
for position in range(12):
    decoder.embed_positions.weight.data[position + decoder.embed_positions.offset, 10 + position] = 50
model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1)
model.save_pretrained("model")
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
tokenizer.chat_template = "{{ messages[0]['content'] }}"
tokenizer.save_pretrained("model")

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen(
    ["venv/bin/transformers", "serve", "model", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
    stderr=open("log", "w"),
)


def ask(prompt, stream):
    body = {"model": "model", "messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "stream": stream}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"] or ""
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


try:
    for _ in range(300):
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.5)
    whole = [f"w{index}" for index in range(10, 22)]
    for length, left in ((4, whole[3:]), (20, [])):
        prompt = " ".join(["w5"] * length)
        plain, streamed = ask(prompt, False).split(), ask(prompt, True).split()
        print(length, "tokens:", plain, "streamed:", streamed)
        assert streamed == whole
        assert plain == left
finally:
    server.terminate()
    server.wait()
PYTHON
