"""GGUF files (llama.cpp) as native checkpoints: read with nothing dropped unseen, dequantised tensor by tensor."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .checkpoint import GGUFCheckpoint, open_checkpoint
from .container import GGUFFile
from .tokenizer import tokenizer_of


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """
    The tokenizer in a GGUF file.

    Raises:
        ConversionError: if it has none, or one of a kind that cannot be built from what the file says.
    """
    return tokenizer_of(GGUFFile(path))


__all__ = ["GGUFCheckpoint", "GGUFFile", "open_checkpoint", "read_tokenizer"]
