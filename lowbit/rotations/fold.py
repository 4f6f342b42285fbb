"""What a transform does to a network, as data (`State`), and how it is folded into the weights.

Rows are activations: a rotation of the residual stream maps x to `x R`, so a weight `[out, in]` that reads it becomes
`W R`, one that writes to it `R^T W` (its bias `b R`), the embedding `E R`. All of it is exact in the function computed:

| field of `State` | network | weights |
|---|---|---|
| `norms` | scales of the RMS norms leave | `W_qkv g`, `W_gate,up g`, `W_head g`; the head is untied first |
| `residual` (R1) | x to `x R` everywhere between blocks | `E R`, `W R` of readers, `R^T W` of writers, head `W R` |
| `heads` (R2) | each value head to `v R` | rows of `W_v`, columns of `W_o`, per layer |
| `smooth` | a linear's input divided by s | `W s`; `1/s` goes into the norm, `v_proj` or `up_proj` before it |
| `inputs` | a linear's input to `T x` online | `W T^-1`; the leaf keeps `T` |
| `caches` | q, k (after RoPE) or v to `T x` online | none: it cancels |

Folding computes in float64 on the host, one weight at a time, and gives float32 (QuaRot, arXiv 2404.00456 section 4;
SpinQuant, arXiv 2405.16406 section 3). An embedding's mean is not subtracted: that is an identity of LayerNorm, not of
RMSNorm. `fold_leaf` is the same for jax arrays, which is how rotations are learned.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.tree import Tree

LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)(\.bias)?")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")
SANDWICH = (
    "norms after attention and MLP scale what is added to the residual stream, so no rotation of it folds through them"
)


@dataclasses.dataclass(frozen=True)
class State:
    """What a transform does; see the table above. Matrices are float64 numpy arrays, or jax arrays while they are
    learned.

    `heads` is keyed by layer, `smooth` by the norm, `o_proj` or `down_proj` that feeds or is the linear, `inputs` and
    `caches` by site.
    """

    name: str
    norms: bool = False
    residual: Any = None  # [D, D]
    heads: Mapping[int, Any] = dataclasses.field(default_factory=dict)  # {layer: [Dh, Dh]}
    smooth: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {path: [I]}
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {path: op}
    caches: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {path: op}


def check_residual(config: ModelConfig, offer: str = "") -> None:
    """Raises `InputError` for a model whose residual stream cannot be rotated."""
    if config.sandwich_norm:
        raise InputError(f"rotation of the residual stream (R1) of a {config.family} model: {SANDWICH}{offer}")


def check_norms(config: ModelConfig) -> None:
    """Raises `InputError` for a model with norms right before its linears (SubLN), which transforms do not fold."""
    if config.sub_norm != "none":
        raise InputError(
            f"transform of a model with sub_norm {config.sub_norm!r}: norms lie between a transform and its inverse "
            "(allowed: recipe bitnet-v2, which trains with online Hadamard transforms)"
        )


def norm_before(config: ModelConfig, path: str) -> str | None:
    """The norm whose output the linear at `path` reads, None if there is none."""
    if path == "lm_head":
        return "model.norm"
    m = LAYER.fullmatch(path)
    if m is None or not config.input_norm:
        return None
    attention = "input_layernorm"
    mlp = "pre_feedforward_layernorm" if config.sandwich_norm else "post_attention_layernorm"
    names = {"q_proj": attention, "k_proj": attention, "v_proj": attention, "gate_proj": mlp, "up_proj": mlp}
    return f"model.layers.{m[1]}.{names[m[2]]}" if m[2] in names else None


def fold_leaf(path: str, w: Any, config: ModelConfig, state: State, get: Callable[[str], Any]) -> Any:
    """One parameter of the folded model from its value `w` and those of others (`get(path)`), in the arithmetic of
    `w`'s own library and dtype. `path` is of the untied model if `state.norms`: `lm_head` gets the embedding then."""
    if path.endswith("norm"):
        return _norm(path, w, config, state)
    if path in ("model.embed_tokens", "lm_head"):
        if path == "lm_head" and state.norms:
            w = w * _scale(get("model.norm"), config)
        return w if state.residual is None else w @ state.residual
    m = LAYER.fullmatch(path)
    if m is None:
        return w
    layer, name, bias = int(m[1]), m[2], m[3] is not None
    weight = path.removesuffix(".bias")
    if not bias:
        norm = norm_before(config, weight)
        if state.norms and norm is not None:
            w = w * _scale(get(norm), config)
        for key in (norm, weight):
            if key in state.smooth:
                w = w * state.smooth[key]
        if state.residual is not None and name in READERS:
            w = w @ state.residual
    if name == "v_proj" and (o := f"model.layers.{layer}.self_attn.o_proj") in state.smooth:
        # Heads that share a key-value head share their scales: those of the first of each group.
        group = config.num_heads // config.num_kv_heads
        s = state.smooth[o].reshape(config.num_kv_heads, group, config.head_dim)[:, 0].reshape(-1)
        w = (w.T / s).T
    if name == "up_proj" and (down := f"model.layers.{layer}.mlp.down_proj") in state.smooth:
        w = (w.T / state.smooth[down]).T
    if layer in state.heads:
        r, dh = state.heads[layer], config.head_dim
        if name == "v_proj":  # v R for each head: R^T on its rows
            heads = w.reshape(-1, dh, *w.shape[1:])
            w = (heads @ r if bias else r.T @ heads).reshape(w.shape)
        elif name == "o_proj" and not bias:
            w = (w.reshape(w.shape[0], -1, dh) @ r).reshape(w.shape)
    if state.residual is not None and name in WRITERS:
        w = w @ state.residual if bias else state.residual.T @ w
    if not bias and (op := state.inputs.get(weight)) is not None:
        w = op.into(w)
    return w


def fold(params: Tree, config: ModelConfig, state: State, dtype: Any = np.float32) -> tuple[Tree, ModelConfig]:
    """The folded parameters and their configuration (untied if norms are folded), ready for the forward pass: linears
    with an online transform are `PreparedInput`s. `dtype` is that of all weights.

    Raises `InputError` for packed or latent weights (fold before quantizing), for weights that have an online transform
    already, and for what the architecture does not allow.
    """
    check_norms(config)
    if state.norms or state.residual is not None:
        check_residual(config)
    untied = config.tied and (state.norms or state.residual is not None)
    flat = dict(trees.items(params))
    if untied:
        flat["lm_head"] = flat["model.embed_tokens"]
    new_config = dataclasses.replace(config, tied=False) if untied else config
    if state.residual is not None and config.input_norm:
        if not state.norms:
            raise InputError(
                "rotation of the residual stream with norms that keep their scales (allowed: fold them first)"
            )
        if scaled := [path for path in state.smooth if path.endswith("norm")]:
            raise InputError(f"rotation of the residual stream with {scaled[0]} smoothed (allowed: one of the two)")

    def get(path: str) -> np.ndarray:
        if not hasattr(leaf := flat[path], "ndim"):
            kind = type(leaf).__name__
            raise InputError(f"{path} is a {kind} (allowed: float weights; transform a model before it is quantized)")
        return np.asarray(leaf).astype(np.float64)

    leaves = {path: partial(get, path) for path in new_config.shapes()}
    out = fold_tree(leaves, config, state, lambda w: jnp.asarray(w.astype(dtype)))
    return trees.build(out | caches(flat, state)), new_config


def fold_tree(
    leaves: Mapping[str, Callable[[], Any]], config: ModelConfig, state: State, done: Callable[[Any], Any] = lambda w: w
) -> dict[str, Any]:
    """`{path: folded parameter}` of `{path: function that gives its value}`, one at a time; linears with an online
    transform become `PreparedInput`s. `done` is applied to each weight."""
    out: dict[str, Any] = {}
    for path, read in leaves.items():
        w = done(fold_leaf(path, read(), config, state, lambda other: leaves[other]()))
        op = state.inputs.get(path)
        out[path] = w if op is None else PreparedInput(w, op=op)
    return out


def caches(flat: Mapping[str, Any], state: State) -> dict[str, CacheSite]:
    """The cache sites of a tree `{path: leaf}`, with the state's transforms."""
    found = {path: leaf for path, leaf in flat.items() if isinstance(leaf, CacheSite)}
    for path, op in state.caches.items():
        site = found.get(path, CacheSite())
        if site.op is not None:
            raise InputError(f"{path} is transformed already by {site.op.name} (allowed: once)")
        found[path] = dataclasses.replace(site, op=op)
    return found


def apply(model: Model, state: State, dtype: Any = np.float32) -> Model:
    """The model that `state` makes of `model`: weights folded, online transforms attached."""
    params, config = fold(model.params, model.config, state, dtype)
    meta = model.meta | {"transform": state.name}
    return model.replace(params=params, config=config, meta=meta)


def _scale(norm: Any, config: ModelConfig) -> Any:
    return norm + 1.0 if config.norm_plus_one else norm


def _norm(path: str, w: Any, config: ModelConfig, state: State) -> Any:
    if path.endswith(("q_norm", "k_norm")):
        return w
    if not state.norms and path not in state.smooth:
        return w
    scale = w * 0.0 + 1.0 if state.norms else _scale(w, config)
    if path in state.smooth:
        scale = scale / state.smooth[path]
    return scale - 1.0 if config.norm_plus_one else scale
