import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit.formats import base
from lowbit.formats.floats import LARGEST, round_to

DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def values() -> np.ndarray:
    """All magnitudes, ties of both types, and fp16's subnormals."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-12, 4.5, 20000)
    x = (rng.choice([-1.0, 1.0], scale.shape) * scale).astype(np.float32)
    halves = np.arange(2**14, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1].astype(np.float64) + halves[1:]) / 2
    upper = (rng.integers(0x3000, 0x4700, 500).astype(np.uint32) << 16) | 0x8000  # bf16 ties
    return np.concatenate([x, halves, ties.astype(np.float32), upper.view(np.float32), [0.0, -0.0, 65504, 65519]])


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
@pytest.mark.parametrize("jitted", [False, True])
def test_round_to_is_the_cast(storage: str, jitted: bool):
    x = values().astype(np.float32)
    f = jax.jit(round_to, static_argnums=1) if jitted else round_to
    want = x.astype(DTYPES[storage]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(f(jnp.asarray(x), storage)).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_round_to_saturates(storage: str):
    x = jnp.asarray([1e38, -3.4e38], jnp.float32)
    got = np.asarray(round_to(x, storage))
    if storage == "fp16":
        np.testing.assert_array_equal(got, [65504, -65504])
    else:
        assert np.isfinite(got).all() and got[1] == -LARGEST["bf16"]


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_float_format_holds_the_cast(storage: str):
    w = values()[:16384].reshape(128, 128)
    q = base.get(storage).encode(jnp.asarray(w))
    assert q.arrays["w"].dtype == DTYPES[storage] and q.bits_per_weight == 16
    np.testing.assert_array_equal(np.asarray(q.arrays["w"]), w.astype(DTYPES[storage]))


def test_too_large_for_fp16():
    with pytest.raises(base.FormatError, match="fp16: weight of magnitude 70000 .largest: 65504"):
        base.get("fp16").encode(jnp.full((2, 2), 7e4, jnp.float32))
