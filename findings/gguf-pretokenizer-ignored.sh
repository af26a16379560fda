#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: `AutoTokenizer.from_pretrained(folder, gguf_file=...)` of a byte-level BPE file.
#
# `tokenizer.ggml.pre` names the rule by which text is cut before merges are applied; llama.cpp keeps a table of them, and
# "smollm" cuts every digit off on its own. The loader does not read the key: each file gets the splitter of its
# architecture's tokenizer, so two files that differ in the key alone give the same ids, and a number is merged where the
# model was trained on single digits.
# The good guess that this defeats: the tokenizer that comes out of a GGUF file is the one whose ids the model knows.
#
# Seen: "12" is the one merged token for `pre` "smollm" and for "gpt-2".
# 2026-11-29
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import gguf
from transformers import AutoTokenizer

TOKENS = ["<|endoftext|>", "1", "2", "12", "a", "b", "ab"]
MERGES = ["1 2", "a b"]
ids = {}
for pre in ("smollm", "gpt-2"):
    writer = gguf.GGUFWriter(f"{pre}.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token.encode() for token in TOKENS])
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=f"{pre}.gguf")
    ids[pre] = tokenizer.convert_ids_to_tokens(tokenizer("12", add_special_tokens=False).input_ids)
print(ids)
# By llama.cpp's rule for "smollm", this is ["1", "2"].
assert ids["smollm"] == ids["gpt-2"]
assert ids["smollm"][-1].endswith("12")
PYTHON
