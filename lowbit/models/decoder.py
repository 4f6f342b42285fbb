"""The decoder: a pure function of a parameter tree (see `lowbit.tree`) for every family that `ModelConfig` describes.

Weights may be arrays, packed `QTensor`s, or `Latent`s and `Coded`s in training: `qdot` decides. Consecutive layers
whose trees have the same structure (same formats, same shapes) are stacked and run under one `scan` if there are
`SCAN_FROM` of them; the rest are unrolled, so a mixed-precision plan costs compile time only where it changes format.
What differs between layers but not in structure (sliding or full attention) is data of the scan.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError, unknown
from lowbit.kernels.qdot import qdot
from lowbit.kernels.qdot.api import dense, prepared
from lowbit.models import cache as caches
from lowbit.models.cache import Cache, Seen
from lowbit.models.config import ModelConfig, RopeScaling
from lowbit.tree import Tree

# A scan compiles any number of layers in the same time, and copies their weights. Measured for three layers on two CPU
# cores: a training step takes 4 to 7 % longer with it, and compiles in 5.7 s instead of 3.0; at six, compile times
# would be equal.
SCAN_FROM = 6
RematPolicy = str
REMAT = ("none", "full", "dots")  # keep everything; recompute whole blocks; keep the results of matrix products


def init_params(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Tree:
    """Random weights: normal with std 0.02, residual outputs scaled by `1 / sqrt(2 L)` (GPT-2), norms at identity."""
    flat = {}
    residual = (2 * config.num_layers) ** -0.5
    for i, (path, shape) in enumerate(config.shapes().items()):
        if len(shape) == 1:
            fill = 0.0 if path.endswith(".bias") or config.norm_plus_one else 1.0
            flat[path] = jnp.full(shape, fill, dtype)
        else:
            scale = 0.02 * (residual if path.endswith(("o_proj", "down_proj")) else 1.0)
            flat[path] = (scale * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)).astype(dtype)
    return trees.build(flat)


def widen(x: Array) -> Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"] | None, eps: float, plus_one: bool = False
) -> Float[Array, "*batch D"]:
    """`x / rms(x) * scale` in float32 (float64 for float64), cast back; Gemma's scale is `1 + weight` and is applied
    before the cast."""
    x32 = widen(x)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is None:
        return y.astype(x.dtype)
    if plus_one:
        return (y * (1.0 + widen(scale))).astype(x.dtype)
    return scale.astype(x.dtype) * y.astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Inverse frequencies `[head_dim / 2]`, float64 on the host (Llama 3.1's piecewise scaling included)."""
    freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    wavelength = 2 * np.pi / freq
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    mixed = (1 - blend) * freq / scaling.factor + blend * freq
    return np.where(wavelength > low, freq / scaling.factor, np.where(wavelength < high, freq, mixed))


def rope(
    x_BTHD: Float[Array, "B T H D"], cos_BTd: Float[Array, "#B T d"], sin_BTd: Float[Array, "#B T d"]
) -> Float[Array, "B T H D"]:
    """Rotates the two halves of each head (HF convention) by position * frequency; in float32 at least, cast back."""
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    a, b = jnp.split(widen(x_BTHD), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHD.dtype)


def attend(
    q_BTHD: Float[Array, "B T H D"],
    k: Seen,
    v: Seen,
    mask_BTS: Bool[Array, "#B T S"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T H D"]:
    """Grouped-query attention with a float32 softmax; `softcap` bounds the logits by `c * tanh(x / c)` (Gemma 2)."""
    heads = (k.exact if k.quantized is None else k.quantized).shape[2]
    q = rearrange(q_BTHD, "B T (K G) D -> B T K G D", K=heads)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    logits = caches.scores(q, k, acc) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask_BTS[:, None, None], logits, jnp.finfo(acc).min)
    p = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return rearrange(caches.mixed(p, v), "B T K G D -> B T (K G) D")


def _activation(config: ModelConfig, x: Array) -> Array:
    match config.activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "relu2":
            return jnp.square(jax.nn.relu(x))
    raise unknown("activation", config.activation, ("silu", "gelu_tanh", "gelu", "relu2"))


def _linear(config: ModelConfig, inputs: dict[str, Array] | None, layer: Tree, name: str, x: Array) -> Array:
    if config.linear_norm:
        x = rms_norm(x, None, config.norm_eps)
    if config.sub_norm == "per_linear":
        x = rms_norm(x, layer[name + "_norm"], config.norm_eps)
    if inputs is not None:
        inputs[name] = prepared(x, layer[name])
    y = qdot(x, layer[name])
    bias = layer.get(name + ".bias")
    return y if bias is None else y + bias.astype(y.dtype)


def _layer(
    config: ModelConfig,
    layer: Tree,
    x_BTD: Array,
    mask: Array,
    cos: Array,
    sin: Array,
    past: caches.LayerCache | None,
    position_BT: Array,
    count_B: Array | None,
    inputs: dict[str, Array] | None = None,
) -> tuple[Array, caches.LayerCache | None]:
    """One block. `past` is its cache, which gets the first `count_B` tokens of each row; `inputs`, if given, is filled
    with what each linear multiplies (`{"q_proj": [B, T, D], ...}`)."""
    norm = partial(rms_norm, eps=config.norm_eps, plus_one=config.norm_plus_one)
    linear = partial(_linear, config, inputs)
    attn, mlp = layer["self_attn"], layer["mlp"]

    h = norm(x_BTD, layer["input_layernorm"]) if config.input_norm else x_BTD
    q = rearrange(linear(attn, "q_proj", h), "B T (H D) -> B T H D", D=config.head_dim)
    k = rearrange(linear(attn, "k_proj", h), "B T (K D) -> B T K D", D=config.head_dim)
    v = rearrange(linear(attn, "v_proj", h), "B T (K D) -> B T K D", D=config.head_dim)
    if config.qk_norm:
        q, k = norm(q, attn["q_norm"]), norm(k, attn["k_norm"])
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    k_site, v_site = attn.get("k_cache"), attn.get("v_cache")
    q, k, v = caches.rotated(k_site, q), caches.rotated(k_site, k), caches.rotated(v_site, v)
    if past is None:
        seen = caches.fresh(k_site, k, position_BT), caches.fresh(v_site, v, position_BT)
    else:
        sides = [caches.append(side, new, position_BT[:, 0], count_B) for side, new in zip(past, (k, v))]
        past, seen = caches.LayerCache(*(side for side, _ in sides)), tuple(s for _, s in sides)
    scale = config.query_scale if config.query_scale is not None else config.head_dim**-0.5
    out = caches.rotated_back(v_site, attend(q, *seen, mask, scale, config.attn_softcap))
    out = rearrange(out, "B T H D -> B T (H D)")
    h = linear(attn, "o_proj", norm(out, attn["attn_sub_norm"]) if config.sub_norm == "sub" else out)
    if config.sandwich_norm:
        h = norm(h, layer["post_attention_layernorm"])
    x_BTD = x_BTD + h

    before_mlp = "pre_feedforward_layernorm" if config.sandwich_norm else "post_attention_layernorm"
    h = norm(x_BTD, layer[before_mlp]) if config.input_norm else x_BTD
    h = _activation(config, linear(mlp, "gate_proj", h)) * linear(mlp, "up_proj", h)
    h = linear(mlp, "down_proj", norm(h, mlp["ffn_sub_norm"]) if config.sub_norm == "sub" else h)
    if config.sandwich_norm:
        h = norm(h, layer["post_feedforward_layernorm"])
    return x_BTD + h, past


def _runs(layers: Sequence[Tree], least: int) -> list[tuple[int, int]]:
    """`[start, stop)` of maximal runs of layers with the same structure, shapes and dtypes; a run of fewer than `least`
    layers is cut into single ones."""
    keys = [(jax.tree.structure(t), tuple((a.shape, jnp.dtype(a.dtype)) for a in jax.tree.leaves(t))) for t in layers]
    runs, start = [], 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or keys[i] != keys[start]:
            runs += [(start, i)] if i - start >= least else [(j, j + 1) for j in range(start, i)]
            start = i
    return runs


def _remat(policy: RematPolicy, f: Any, scanned: bool) -> Any:
    # Inside a scan nothing can be merged across iterations, so the barrier against it would only cost time.
    remat = partial(jax.checkpoint, f, prevent_cse=not scanned)
    match policy:
        case "none":
            return f
        case "full":
            return remat()
        case "dots":
            return remat(policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise unknown("remat policy", policy, REMAT)


def _attention_inputs(
    config: ModelConfig, position_BT: Array, S: int, segments_BT: Array | None, dtype: Any
) -> tuple[Array, Array, Array, Array]:
    """`(kinds [L], masks [N, #B, T, S], cos, sin [N, #B, T, Dh / 2])`; layer `l` uses version `kinds[l]` of each."""
    versions = sorted(set(config.sliding))
    slots_S = jnp.arange(S)
    causal = slots_S <= position_BT[:, :, None]
    masks, freqs = [], []
    for sliding in versions:
        near = slots_S > position_BT[:, :, None] - (config.sliding_window or 0)
        masks.append(causal & near if sliding else causal)
        local = sliding and config.rope_local_theta is not None
        theta, scaling = (config.rope_local_theta, None) if local else (config.rope_theta, config.rope_scaling)
        freqs.append(rope_frequencies(config.head_dim, theta, scaling))
    mask_NBTS = jnp.stack(masks)
    if segments_BT is not None:
        mask_NBTS = mask_NBTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    wide = jnp.promote_types(dtype, jnp.float32)
    freq_Nd = jnp.asarray(np.stack(freqs), wide)
    angle_NBTd = position_BT.astype(wide)[None, :, :, None] * freq_Nd[:, None, None]
    kinds = jnp.asarray([versions.index(s) for s in config.sliding], jnp.int32)
    return kinds, mask_NBTS, jnp.cos(angle_NBTd), jnp.sin(angle_NBTd)


def hidden_states(
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    config: ModelConfig,
    *,
    cache: Cache | None = None,
    count_B: Int[Array, " B"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    remat: RematPolicy = "none",
    scan: bool | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Final hidden states (after the last norm) and the updated cache.

    With a cache, rows go on at their own lengths, and `count_B` of each row's tokens are real (None: all): padding is
    at the right, where nothing that is real sees it. `segments_BT` gives each token its document: attention does not
    cross documents (positions keep counting, which RoPE does not see inside a document). Equal layers are scanned
    from `SCAN_FROM` on; `scan=True` scans two already, `False` none: a scan stacks the weights first, a copy that a
    one-token step would pay for each time. Raises `InputError` for a sequence beyond `max_position` or beyond the
    cache, and for segments together with a cache or with cache formats that give scales to blocks of tokens.
    """
    B, T = tokens_BT.shape
    layers = [params["model"]["layers"][str(i)] for i in range(config.num_layers)]
    S = T if cache is None else caches.slots(cache)
    if cache is None and T > config.max_position:
        raise InputError(f"sequence of {T} tokens (the model's max_position_embeddings is {config.max_position})")
    if T > S:
        raise InputError(f"{T} tokens for a cache of {S} positions (allowed: at most as many)")
    if segments_BT is not None:
        _check_segments(layers, cache)
    position_BT = jnp.arange(T)[None] if cache is None else cache.length[:, None] + jnp.arange(T)
    if cache is not None and count_B is None:
        count_B = jnp.full(B, T, jnp.int32)
    kinds, masks, cos, sin = _attention_inputs(config, position_BT, S, segments_BT, dtype)
    pasts = [None] * len(layers) if cache is None else list(cache.layers)

    def step(x: Any, xs: Any) -> tuple[Any, Any]:
        layer, kind, past = xs
        return _layer(config, layer, x, masks[kind], cos[kind], sin[kind], past, position_BT, count_B)

    x = embed(params, tokens_BT, config, dtype)
    least = {None: SCAN_FROM, True: 2, False: len(layers) + 1}[scan]
    for a, b in _runs(layers, least):
        if b - a == 1:
            x, pasts[a] = _remat(remat, step, False)(x, (layers[a], kinds[a], pasts[a]))
        else:
            stacked, past = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *t[a:b]) for t in (layers, pasts))
            x, past = jax.lax.scan(_remat(remat, step, True), x, (stacked, kinds[a:b], past))
            pasts[a:b] = [jax.tree.map(lambda leaf, i=i: leaf[i], past) for i in range(b - a)]
    x = rms_norm(x, params["model"]["norm"], config.norm_eps, config.norm_plus_one)
    return x, None if cache is None else Cache(tuple(pasts), cache.length + count_B)


def _check_segments(layers: Sequence[Tree], cache: Cache | None) -> None:
    if cache is not None:
        raise InputError("segments together with a cache (allowed: one of the two)")
    for layer in layers:
        for name in ("k_cache", "v_cache"):
            site = layer["self_attn"].get(name)
            if site is not None and site.format is not None and site.format.tokens > 1:
                raise InputError(
                    f"segments together with cache format {site.format.name}, whose blocks of {site.format.tokens} "
                    "tokens would cross documents (allowed: token formats, or rows of one document)"
                )


def block(
    config: ModelConfig, layer: Tree, x_BTD: Float[Array, "B T D"], index: Int[Array, ""]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T _"]]]:
    """One layer alone, on whole sequences: its output, and what each of its linears multiplies, by the linear's name.

    What calibration runs block by block; `index` is the layer's, which decides whether its attention slides.
    """
    T, inputs = x_BTD.shape[1], {}
    position_BT = jnp.arange(T)[None]
    kinds, masks, cos, sin = _attention_inputs(config, position_BT, T, None, x_BTD.dtype)
    kind = kinds[index]
    y, _ = _layer(config, layer, x_BTD, masks[kind], cos[kind], sin[kind], None, position_BT, None, inputs)
    return y, inputs


def embed(params: Tree, tokens_BT: Int[Array, "B T"], config: ModelConfig, dtype: Any) -> Float[Array, "B T D"]:
    """Rows of the embedding (decoded whole if it is packed), times the family's embedding scale."""
    x = jnp.take(dense(params["model"]["embed_tokens"]), tokens_BT, axis=0).astype(dtype)
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, dtype)


def head(params: Tree, x_BTD: Float[Array, "*batch D"], config: ModelConfig) -> Float[Array, "*batch V"]:
    """Logits in float32 (float64 for float64) of final hidden states."""
    w = params["model"]["embed_tokens"] if config.tied else params["lm_head"]
    logits = widen(qdot(x_BTD, w))
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


def forward(
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    config: ModelConfig,
    *,
    segments_BT: Int[Array, "B T"] | None = None,
    remat: RematPolicy = "none",
    dtype: Any = jnp.float32,
) -> Float[Array, "B T V"]:
    """Logits in float32 (float64 for float64) for every position. `dtype` is the compute dtype."""
    x, _ = hidden_states(params, tokens_BT, config, segments_BT=segments_BT, remat=remat, dtype=dtype)
    return head(params, x, config)
