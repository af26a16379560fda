"""What is faster or smaller where one asks for it: decoding on a CPU, weights of 8 bits, the loss in chunks, training."""

from .decoding import Acceleration, accelerate_decoding
from .int8 import quantize_int8
from .loss import chunk_loss
from .training import TrainingMemory, save_training_memory


__all__ = [
    "Acceleration",
    "TrainingMemory",
    "accelerate_decoding",
    "chunk_loss",
    "quantize_int8",
    "save_training_memory",
]
