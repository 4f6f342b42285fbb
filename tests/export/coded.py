"""Tiny models whose linears hold random codes of a format: nothing is searched, so any rate costs nothing."""

import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.formats import base as formats
from lowbit.formats.base import Format, QTensor
from lowbit.models.model import Model
from lowbit.vq.additive import Additive
from lowbit.vq.e8 import E8P
from lowbit.vq.incoherent import Incoherent
from lowbit.vq.layouts.base import pack
from lowbit.vq.trellis import TrellisFormat
from tests.export.small_models import byte_model

SCALE = 3001 / 2**15  # 12 significant bits


def weight(fmt: Format, shape: tuple[int, int], seed: int) -> QTensor:
    """Random codes, and parameters as `stored` gives them."""
    rng = np.random.default_rng(seed)
    O, I = shape

    def half(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / 4).astype(np.float16).astype(np.float32)

    inner, signs = fmt, {}
    if isinstance(fmt, Incoherent):
        inner, signs = fmt.inner, fmt.signs(jnp.ones(shape))
        if fmt.trained:
            signs = {k: s * (1 + np.abs(half(*s.shape))).astype(np.float16) for k, s in signs.items()}
    if isinstance(inner, E8P):
        codes = rng.integers(0, 2 ** (8 * inner.width), (O, I // 8))
        stored = {"scale": np.full((1, 1), 0.123456789)}
    elif isinstance(inner, TrellisFormat):
        codes = rng.integers(0, 2 ** int(inner.K * inner.V), (O // 16, I // 16 * 256 // inner.V))
        stored = {"scale": np.full((1, 1), SCALE)}
        stored |= {} if inner.codebook is None else {"codebook": inner.codebook + half(*inner.codebook.shape)}
        stored = {k: a.astype(np.float16 if k == "codebook" else np.float32) for k, a in stored.items()}
    elif isinstance(inner, Additive):
        M, B, G = inner.number, inner.bits, inner.size
        codes = rng.integers(0, 2**B, (O, I // G * M))
        stored = {"codebook": half(M, 1, 2**B, G), "scale": np.abs(half(O, 1)) + 0.5}
    else:
        codes = rng.integers(0, 2**inner.bits, (O // inner.size, I))
        stored = {"codebook": half(1, 1, inner.entries, inner.size)}
        stored |= {"residual": half(1, 1, inner.rest, inner.size)} if inner.rest else {}
        stored |= {"scale": np.abs(half(1, I)) + 0.5} if inner.column_scale else {}
    stored = {k: jnp.asarray(a, jnp.float32) for k, a in (stored | signs).items()}
    return QTensor(pack(fmt, jnp.asarray(codes.astype(np.uint32).view(np.int32)), stored), fmt, shape)


def coded_model(format: str, others: dict[str, str] | None = None, **changes) -> Model:
    """One layer of width 128 (between 256), two heads of 64, with every linear in `format`; `others` by the end of
    the path: another format, or "" for a float weight."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=64)
    model = byte_model(**sizes | changes)
    flat = dict(trees.items(model.params))
    for i, (path, w) in enumerate(flat.items()):
        name = format if ".layers." in path else ""
        name = next((f for end, f in (others or {}).items() if path.endswith(end)), name)
        if w.ndim == 2 and name:
            flat[path] = weight(formats.get(name), w.shape, i)
    return model.replace(params=trees.build(flat))
