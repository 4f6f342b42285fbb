"""Weights that every format has to survive, and bitwise comparison."""

import jax
import numpy as np

SHAPE = (16, 512)  # rows hold two of the largest blocks (256), columns a tile of a trellis


def weights() -> dict[str, np.ndarray]:
    """float32 `SHAPE` matrices by what they are hard for, within fp16's range so that every format holds them."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SHAPE).astype(np.float32)
    zeros = 0.02 * normal
    zeros[0] = 0.0
    zeros[1, :256] = 0.0
    zeros[2, ::3] = -0.0
    tiny = 1e-9 * normal
    tiny[0] *= 1e-20
    tiny[1] = np.float32(1e-42)  # float32 subnormals
    tiny[2] = 3e-8  # at fp16's smallest scale
    steps = rng.integers(-17, 18, SHAPE).astype(np.float32)
    mixed = 0.02 * normal * 10.0 ** rng.uniform(-6, 5, SHAPE)
    return {
        "normal": 0.02 * normal,
        "heavy": 0.02 * rng.standard_t(2, SHAPE).astype(np.float32).clip(-500, 500),
        "zeros": zeros,
        "ties": steps * np.float32(2.0**-7),  # halves of the power-of-two steps that absmax scales make of them
        "tiny": tiny,
        "huge": 1e4 * normal.clip(-3, 3),
        "mixed": mixed.astype(np.float32),
        "constant": np.full(SHAPE, 0.37, np.float32),
    }


def same_bits(a, b) -> bool:
    """Equal bit for bit: -0.0 is not 0.0."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def same_tree(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        same_bits(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
