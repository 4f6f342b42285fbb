"""SmoothQuant: channels that are large in the activations are made small there and large in the weights
(Xiao et al. 2023, arXiv 2211.10438, equation 4).

For the input X and the weights W of a site, `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`; the input becomes `X / s`,
the weights `W s`. `1/s` goes into the norm before the site (q, k, v and gate, up share theirs); with `all` also into
`v_proj` before `o_proj` (one s for the heads that share a key-value head) and into `up_proj` before `down_proj`.
Nothing stays online. Names: `smoothquant` (alpha 0.5), `smoothquant:a0.8`, `smoothquant:all`; `:n32` takes 32 rows of
calibration text.

With `int8:token` at the inputs this is the paper's dynamic W8A8 (its O1), with `int8:tensor`, whose scale is
calibrated after the folding, the static one (O3).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.ptq import calibrate
from lowbit.rotations.base import Transform, no_more, number_of, register
from lowbit.rotations.fold import State, check_norms, norm_before

LEAST = 1e-5  # of a channel's largest magnitude: a channel that is always zero would otherwise divide by it


def fit(
    model: Model,
    documents: Sequence[str] | None = None,
    assignment: Mapping[str, Any] | None = None,
    *,
    name: str = "smoothquant",
    alpha: float = 0.5,
    everywhere: bool = False,
    rows: int = 128,
) -> State:
    """The scales for a model from the largest magnitudes on `rows` rows of the text. Raises `InputError` for models
    without norms before the linears, which have nothing that `1/s` could go into."""
    check_norms(model.config)
    if not model.config.input_norm:
        raise InputError(f"smoothquant of {model.source or 'a model'}, which has no norm before its linears")
    stats = calibrate.model_statistics(model, list(documents or ()), rows)
    absmax = {path: s.absmax_I for path, s in stats.items()}
    return State(name, smooth=scales(model, absmax, alpha, everywhere))


def scales(
    model: Model, absmax: Mapping[str, Float[np.ndarray, " I"]], alpha: float, everywhere: bool
) -> dict[str, np.ndarray]:
    """`{norm, o_proj or down_proj: s}` in float64, from the largest magnitude of each input channel of each linear."""
    c, out = model.config, {}
    for site, group in groups(c, everywhere).items():
        x = np.maximum(np.asarray(absmax[group[0]], np.float64), LEAST)
        w = np.max([np.abs(np.asarray(trees.get(model.params, p), np.float64)).max(axis=0) for p in group], axis=0)
        x, w = (shared(c, site, v) for v in (x, np.maximum(w, LEAST)))
        out[site] = x**alpha / w ** (1 - alpha)
    return out


def groups(c: ModelConfig, everywhere: bool) -> dict[str, list[str]]:
    """`{where 1/s goes: linears that read it}`; `o_proj` and `down_proj` stand for `v_proj` and `up_proj`."""
    out: dict[str, list[str]] = {}
    for i in range(c.num_layers):
        for name in c.linear_shapes():
            path = f"model.layers.{i}.{name}"
            if (norm := norm_before(c, path)) is not None:
                out.setdefault(norm, []).append(path)
            elif everywhere:
                out[path] = [path]
    return out


def shared(c: ModelConfig, site: str, x_I: np.ndarray) -> np.ndarray:
    """The largest over the heads that share a key-value head, if the site is an `o_proj`."""
    if not site.endswith("o_proj"):
        return x_I
    heads = x_I.reshape(c.num_kv_heads, -1, c.head_dim)
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


def _parse(name: str, keys: list[str]) -> Transform:
    everywhere = "all" in keys
    keys = [k for k in keys if k != "all"]
    alpha = number_of(name, keys, "a", 0.5, 0.0, 1.0)
    rows = number_of(name, keys, "n", 128, 1, 10**6)
    no_more(name, keys, ["a0.5", "all", "n128"])
    return Transform(name, partial(fit, name=name, alpha=alpha, everywhere=everywhere, rows=rows), calibrates=True)


register("smoothquant", _parse, ["smoothquant:a0.8:n8", "smoothquant:all:n8"])
