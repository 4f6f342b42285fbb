"""The scalar quantizer of least squared error for N(0, 1): what every vector code is measured against (Max, "Quantizing
for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982)."""

import functools
import math

import numpy as np
from jaxtyping import Float

from lowbit.errors import InputError


@functools.cache
def lloyd_max(bits: int) -> tuple[Float[np.ndarray, " n"], float]:
    """`(levels, error)`: the 2^bits levels, ascending, float64, and the mean squared error of N(0, 1), in closed form.

    Each level is the mean of its cell and each border the middle of two levels; iterated until no level moves by 1e-13.
    Raises `InputError` unless bits are 1 to 8.
    """
    if bits not in range(1, 9):
        raise InputError(f"Lloyd-Max quantizer of {bits} bits (allowed: 1 to 8)")
    n = 2**bits
    levels = 1.7 * bits**0.5 * (np.arange(n) + 0.5 - n / 2) / (n / 2)
    while True:
        inner = (levels[1:] + levels[:-1]) / 2
        density = np.concatenate([[0.0], np.exp(-(inner**2) / 2) / math.sqrt(2 * math.pi), [0.0]])
        # From erfc of the nearer tail: differences of a distribution function near 1 would lose the outer cells.
        tail = np.array([math.erfc(abs(b) / math.sqrt(2)) / 2 for b in inner])
        mass = np.diff(np.concatenate([[0.0], np.where(inner < 0, tail, 1 - tail), [1.0]]))
        mass = (mass + mass[::-1]) / 2
        new = (density[:-1] - density[1:]) / mass
        new = (new - new[::-1]) / 2
        if np.abs(new - levels).max() < 1e-13:
            return new, float(1 - np.sum(mass * new**2))
        levels = new
