"""Faster decoding on a CPU, which can be switched on and off: `accelerate_decoding`."""

from .decoding import Acceleration, accelerate_decoding


__all__ = ["Acceleration", "accelerate_decoding"]
