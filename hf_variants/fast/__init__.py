"""What is faster or smaller where one asks for it: decoding on a CPU, weights of 8 bits, and the loss in chunks."""

from .decoding import Acceleration, accelerate_decoding
from .int8 import quantize_int8
from .loss import chunk_loss


__all__ = ["Acceleration", "accelerate_decoding", "chunk_loss", "quantize_int8"]
