"""GuidedQuant: its Hessians against gradients of single tokens, and groups of outputs against their own solutions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.kernels.qdot import qdot
from lowbit.kernels.qdot.probe import Probe
from lowbit.models import decoder
from lowbit.ptq.gptq import gptq, quadratic_error
from lowbit.ptq.guided import guided, hessians
from lowbit.ptq.options import GuidedOptions
from lowbit.ptq.vptq import vptq
from tests.models.tiny import tiny
from tests.ptq.tiles import correlated

O, I, G = 8, 32, 2
W = np.random.default_rng(0).standard_normal((O, I)).astype(np.float32)
H = np.stack([correlated(I, seed=s) for s in (1, 2)])


@pytest.mark.parametrize("name", ["nuq2", "int3:g16"])
def test_each_group_of_outputs_is_solved_by_its_own_hessian(name):
    fmt = formats.get(name)
    solve = vptq if name == "nuq2" else lambda *a: gptq(*a, act_order=True)
    r = guided(W, H, fmt)
    parts = [solve(W[4 * g : 4 * g + 4], H[g], fmt) for g in range(G)]
    np.testing.assert_array_equal(r.w_hat_OI, np.concatenate([p.w_hat_OI for p in parts]))
    np.testing.assert_array_equal(r.q.decode(), r.w_hat_OI)
    assert r.error == pytest.approx(sum(p.error for p in parts))
    shared = solve(W, H.mean(0), fmt).w_hat_OI
    assert r.error < sum(quadratic_error(W[4 * g : 4 * g + 4], shared[4 * g : 4 * g + 4], H[g]) for g in range(G))


def test_bad_input():
    with pytest.raises(InputError, match="weight: 3 groups of 8 outputs"):
        guided(W, H[[0, 1, 0]], formats.get("nuq2"))
    for name in ("vptq:v4:k4", "int4:tensor", "e8p2", "rht:int4:g32"):
        with pytest.raises(InputError, match=f"format '{name}.* with solver guided .allowed: nuq1 .. nuq4, grids"):
            guided(W, H, formats.get(name))
    with pytest.raises(InputError, match="guided groups is 0"):
        GuidedOptions(groups=0)
    model = tiny(num_layers=1)
    path = "model.layers.0.self_attn.o_proj"
    with pytest.raises(InputError, match=f"{path}: 5 groups of 32 outputs"):
        hessians(model.config, model.params, (path,), TOKENS, 5)
    gate = "model.layers.0.mlp.gate_proj"
    params = trees.map_leaves(lambda p, a: a.at[:, 24:].set(0) if p.endswith("down_proj") else a, model.params)
    with pytest.raises(InputError, match=f"gradient of {gate}, group 1 of its outputs, is 0 on all"):
        hessians(model.config, params, (gate,), TOKENS[:1], 2)
    params = trees.map_leaves(lambda p, a: a * 0 if p.endswith("v_proj") else a, model.params)
    with pytest.raises(InputError, match=f"gradient of {path}, group 0 of its outputs, is 0 on all"):
        hessians(model.config, params, (path,), TOKENS[:1], 2)


TOKENS = np.random.default_rng(0).integers(3, 61, (3, 6)).astype(np.int32)


def test_a_probe_says_what_outputs_cost():
    """`sum_t mean_o (dloss / dz_to)^2 x_t x_t^T` in float64, and nothing else changes."""
    rng = np.random.default_rng(1)
    x, goal = rng.standard_normal((2, 3, I)).astype(np.float32), rng.standard_normal((2, 3, O)).astype(np.float32)

    def loss(x, sums):
        w = jnp.asarray(W) if sums is None else Probe(jnp.asarray(W), sums)
        return jnp.sum(jnp.sin(qdot(x, w)) * goal)

    dx, got = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.zeros((G, I, I)))
    np.testing.assert_allclose(dx, jax.grad(loss)(jnp.asarray(x), None), rtol=1e-6, atol=1e-6)
    g = (np.cos(x.astype(np.float64) @ W.T) * goal).reshape(6, G, O // G)
    want = np.einsum("ng,ni,nj->gij", np.square(g).mean(-1), *[x.reshape(6, I).astype(np.float64)] * 2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@partial(jax.tree_util.register_dataclass, data_fields=["w", "add_BTO"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Added:
    """A weight whose product gets something added, so that the sum's gradient is the output's."""

    w: jax.Array
    add_BTO: jax.Array


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_hessians_of_a_model_are_sums_over_tokens(path, monkeypatch):
    model, groups = tiny(num_layers=2), 4
    w = trees.get(model.params, path)
    seen = []

    def product(x, leaf):
        if not isinstance(leaf, Added):
            return qdot(x, leaf)
        seen.append(x)
        return qdot(x, leaf.w) + leaf.add_BTO

    monkeypatch.setattr(decoder, "qdot", product)

    @jax.jit
    def gradient(row):
        def loss(add):
            tree = trees.map_leaves(lambda p, a: Added(w, add) if p == path else a, model.params)
            logp = jax.nn.log_softmax(decoder.forward(tree, row[None], model.config)[0])
            return -jnp.sum(jnp.take_along_axis(logp[:-1], row[1:, None], axis=1)), seen[-1]

        return jax.grad(loss, has_aux=True)(jnp.zeros((1, len(row), w.shape[0])))

    got = hessians(model.config, model.params, (path,), TOKENS, groups)[path]
    want = np.zeros((groups, w.shape[1], w.shape[1]))
    for row in TOKENS:
        g, x = (np.asarray(a[0], np.float64) for a in gradient(jnp.asarray(row)))
        assert np.abs(g[:-1]).max() > 0
        want += np.einsum("tg,ti,tj->gij", np.square(g).reshape(len(row), groups, -1).mean(-1), x, x)
    want /= np.mean(np.diagonal(want, axis1=1, axis2=2))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4 * np.abs(want).max())
