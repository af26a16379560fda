"""The models that operations of surgery are tried on."""

import torch

from tests.native_rows import all_rows


# Types with a stock class of their own.
ROWS = {model_type: row for model_type, row in all_rows().items() if row.reference is None}
NAMED = ("llama", "qwen3", "gemma3_text", "smollm3", "olmo3", "gpt2", "bloom", "t5", "bart", "bert")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}
IDS = torch.arange(20)[None]
