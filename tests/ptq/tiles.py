"""A format that rounds tiles of several rows and columns at once, and stores one code for each."""

import dataclasses

import jax.numpy as jnp
from einops import rearrange

from lowbit.formats.base import Format, FormatError

TALL, WIDE = 2, 4
LEVELS = 4


@dataclasses.dataclass(frozen=True)
class Tiles(Format):
    """2 x 4 weights on half-integers between -1.5 and 1.5 whose sum is even, times one scale: the worst of the eight is
    moved where it is odd. A code has 2 bits for each; codes are `[O / 2, I / 4]`. The codebook rides along among the
    parameters, to see that solvers leave it alone."""

    @property
    def name(self):
        return "tiles"

    @property
    def tile(self):
        return (TALL, WIDE)

    def check(self, shape):
        if shape[0] % TALL or shape[1] % WIDE:
            raise FormatError(f"{self.name}: weight of shape {shape}")

    def init(self, w_OI, stats=None, key=None):
        return {
            "scale": jnp.sqrt(jnp.mean(jnp.square(w_OI), keepdims=True)),
            "levels": jnp.arange(LEVELS, dtype=jnp.float32)[:, None] - 1.5,
        }

    def stored(self, params):
        return params

    def quantize(self, w_OI, stored):
        v = rearrange(w_OI / stored["scale"][0, 0], "(o s) (i t) -> o i (s t)", s=TALL, t=WIDE) + 1.5
        q = jnp.clip(jnp.round(v), 0, LEVELS - 1)
        up = (q < LEVELS - 1) & ((v >= q) | (q == 0))
        gain = jnp.abs(v - q)
        worst = jnp.argmax(gain, axis=-1)[..., None] == jnp.arange(TALL * WIDE)
        moved = q + jnp.where(worst, jnp.where(up, 1.0, -1.0), 0.0)
        q = jnp.where(jnp.sum(q, axis=-1, keepdims=True) % 2 == 0, q, moved).astype(jnp.int32)
        return jnp.sum(q << (2 * jnp.arange(TALL * WIDE)), axis=-1)

    def dequantize(self, codes, stored):
        at = (codes[..., None] >> (2 * jnp.arange(TALL * WIDE))) & 3
        w = stored["levels"][at, 0] * stored["scale"][0, 0]
        return rearrange(w, "o i (s t) -> (o s) (i t)", s=TALL, t=WIDE)

    def pack(self, codes, stored):
        return {"codes": codes, **stored}

    def unpack(self, arrays, shape):
        return arrays["codes"], {k: arrays[k] for k in ("scale", "levels")}


def correlated(n, seed=0):
    """A Hessian of inputs with a few strong directions."""
    import numpy as np

    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, n // 4)) @ rng.standard_normal((n // 4, n))
    x = x / 4 + 0.3 * rng.standard_normal((512, n))
    return (2 / 512 * x.T @ x).astype(np.float32)
