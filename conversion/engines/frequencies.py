"""RoPE as engines are told it: divisors of the frequencies of a base."""

import math

import torch


def frequency_factors(inverse: torch.Tensor, base: float) -> list[float] | None:
    """
    What the plain inverse frequencies of a base are divided by to give others, (rotary_dim / 2,); `None` where they are
    the plain ones. A frequency of 0, which rotates nothing, has an infinite factor.
    """
    pairs = len(inverse)
    plain = [base ** (-pair / pairs) for pair in range(pairs)]
    if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(plain, inverse.tolist())):
        return None
    return [a / b if b else math.inf for a, b in zip(plain, inverse.tolist())]
