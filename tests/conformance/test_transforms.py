"""Law 5, the function law: a transform leaves the logits of the unquantized network as they were.

In float64 within 1e-10, in float32 within 1e-4 of the largest logit, for every registered transform and every family of
models that it takes; and what is *not* an equivalence fails by the same measure.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.models.model import Model
from lowbit.rotations import base, fold
from tests.models.tiny import CONFIGS, params_of

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24))
TEXT = ["the quick brown fox jumps over the lazy dog " * 40]
# A model with 6 heads, a width of 48 and 112 between (QuaRot's odd sizes: 12 x 4, 28 x 4), one with 3 key-value heads.
ODD = dataclasses.replace(
    CONFIGS["llama-biases"], hidden_size=48, intermediate_size=112, num_heads=12, num_kv_heads=3, tied=True
)
FAMILIES = {**CONFIGS, "odd": ODD}


def logits(params, config: ModelConfig, dtype=jnp.float64) -> np.ndarray:
    with jax.enable_x64(dtype == jnp.float64):
        wide = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
        return np.asarray(jax.jit(forward, static_argnames=("config", "dtype"))(wide, TOKENS, config, dtype=dtype))


def small(config: ModelConfig) -> Model:
    """Two layers, of both kinds where there are two, with a vocabulary for bytes."""
    config = dataclasses.replace(config, num_layers=2, vocab_size=260, sliding_layers=config.sliding_layers[1:])
    return Model(config, params_of(config), ByteTokenizer())


def cases() -> list:
    """Every pair. By default a learned transform, which compiles for a quarter of a minute, runs on one family that it
    takes, QuaRot and SmoothQuant on one of each kind, and what is a part of another transform on two."""
    whole = ("quarot", "quarot:heads+r3+r4", "smoothquant:all:n8")
    kinds = ("qwen3", "gemma3", "bit", "bitnet", "odd")
    default = {n: ("odd", "gemma3") for n in base.names()} | {n: kinds for n in whole}
    default |= {n: ("gemma3",) if n.startswith("flat") else ("odd",) for n in base.names() if base.get(n).learns}
    return [
        pytest.param(n, f, marks=[] if f in default[n] else [pytest.mark.slow]) for n in base.names() for f in FAMILIES
    ]


@pytest.mark.parametrize("name, family", cases())
def test_function_law(name: str, family: str):
    model = small(FAMILIES[family])
    try:
        state = base.get(name).fit(model, TEXT)
    except InputError as e:
        assert refusal(name, model.config) and refusal(name, model.config) in str(e)
        return
    assert not refusal(name, model.config)
    with jax.enable_x64(True):
        other = fold.apply(model, state, np.float64)
    want = logits(model.params, model.config)
    assert np.abs(logits(other.params, other.config) - want).max() <= 1e-10
    assert changed(model, other), "the transform did nothing"
    narrow = fold.apply(model, state)
    got32 = logits(narrow.params, narrow.config, jnp.float32)
    assert np.abs(got32 - want).max() <= 1e-4 * np.abs(want).max()


def refusal(name: str, config: ModelConfig) -> str | None:
    """What a transform says about a family that it cannot take, None if it can."""
    if config.sub_norm != "none":
        return "sub_norm"
    parts = [p for p in ("r1", "r2", "heads", "r3", "r4") if p in name]
    if name.startswith(("quarot", "spinquant")) and config.sandwich_norm and (not parts or "r1" in parts):
        return "rotation of the residual stream"
    if name.startswith(("smoothquant", "flatquant")) and not config.input_norm:
        return "norm"
    return None


def changed(a: Model, b: Model) -> bool:
    x, y = dict(trees.items(a.params)), dict(trees.items(b.params))
    return (
        set(x) != set(y)
        or any(jax.tree.structure(x[p]) != jax.tree.structure(y[p]) for p in x)
        or any(
            np.abs(np.asarray(u) - np.asarray(v)).max() > 1e-3
            for p in x
            for u, v in zip(jax.tree.leaves(x[p]), jax.tree.leaves(y[p]))
        )
    )


# -- what must fail ---------------------------------------------------------------------------------------------------


def difference(params, model: Model, config: ModelConfig | None = None) -> float:
    return np.abs(logits(params, config or model.config) - logits(model.params, model.config)).max()


def test_rotating_without_folding_norms_changes_the_function():
    model = small(CONFIGS["llama"])
    state = dataclasses.replace(base.get("quarot:r1").fit(model), norms=False)
    with pytest.raises(InputError, match="fold them first"):
        fold.fold(model.params, model.config, state)
    flat = dict(trees.items(model.params))
    get = lambda p: np.asarray(flat[p], np.float64)  # noqa: E731
    wrong = trees.build({p: fold.fold_leaf(p, get(p), model.config, state, get) for p in flat})
    assert difference(wrong, model) > 0.1


def test_subtracting_the_embeddings_mean_changes_the_function():
    model = small(CONFIGS["llama"])
    w = np.asarray(model.params["model"]["embed_tokens"], np.float64)
    wrong = trees.map_leaves(
        lambda p, a: w - w.mean(-1, keepdims=True) if p == "model.embed_tokens" else a, model.params
    )
    assert difference(wrong, model) > 0.1


def test_rotating_queries_and_keys_before_rope_changes_the_function():
    model = small(CONFIGS["llama"])
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]

    def wrong(path: str, w):
        if not path.endswith(("q_proj", "k_proj")):
            return w
        w = np.asarray(w, np.float64)
        return (rotation @ w.reshape(-1, 8, w.shape[1])).reshape(w.shape)

    assert difference(trees.map_leaves(wrong, model.params), model) > 0.1


def test_an_online_transform_that_is_left_out_changes_the_function():
    model = small(CONFIGS["llama"])
    state = base.get("quarot:r4").fit(model)
    folded, config = fold.fold(model.params, model.config, state)
    wrong = trees.map_leaves(lambda p, a: getattr(a, "w", a), folded)
    assert difference(wrong, model, config) > 0.1
