#!/usr/bin/env bash
# transformers 5.23.0: ErnieForMultipleChoice with `task_type_ids`.
#
# Ids, masks, token types and positions of choices are (batch, choices, length), and the class lays the choices one below the
# other before it runs. It forgets task types, which checkpoints of ERNIE 2 and 3 use (`use_task_id`): in the shape of all other
# inputs they raise an error about sizes, and they run only as (batch * choices, length).
# The good guess that this defeats: all per-token inputs of a multiple-choice model have one shape, as its documentation says of
# them.
#
# Seen: RuntimeError for (2, 3, 7); (6, 7) runs, beside token types of (2, 3, 7).
# 2026-12-01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import ErnieConfig, ErnieForMultipleChoice

config = ErnieConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, use_task_id=True,
    task_type_vocab_size=3,
)
model = ErnieForMultipleChoice(config).eval()
ids = torch.randint(3, 50, (2, 3, 7))
types = torch.zeros_like(ids)
assert model(ids, token_type_ids=types).logits.shape == (2, 3)
try:
    model(ids, token_type_ids=types, task_type_ids=types)
except RuntimeError as error:
    print("as the other inputs:", error)
else:
    raise AssertionError("task types are laid out as the others now")
shape = model(ids, token_type_ids=types, task_type_ids=types.flatten(0, 1)).logits.shape
print("flat:", tuple(shape))
assert shape == (2, 3)
PYTHON
