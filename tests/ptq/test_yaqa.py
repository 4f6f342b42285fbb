"""YAQA against its definition, LDLQ, and its Hessians against gradients of a model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor
from lowbit.linalg.block_ldl import block_ldl
from lowbit.models.hf import load_hf, save_hf
from lowbit.plan import Plan
from lowbit.ptq import base as solvers
from lowbit.ptq.gptq import gptq
from lowbit.ptq.yaqa import Sketch, sketches, yaqa
from lowbit.vq.incoherent import Incoherent
from tests.export.small_models import byte_model
from tests.models.tiny import forward, tiny
from tests.ptq.test_rtn import Interrupted, interrupt_at, same
from tests.ptq.tiles import Tiles, correlated

O, I = 12, 40
W = np.random.default_rng(1).standard_normal((O, I)).astype(np.float32)
BOTH = Sketch(correlated(I, 1), correlated(O, 2))


def two_sided(w_hat, sketch=BOTH, w=W):
    d = w.astype(np.float64) - np.asarray(w_hat, np.float64)
    return float(np.sum((sketch.H_OO.astype(np.float64) @ d @ sketch.H_II.astype(np.float64)) * d))


def definition(w, sketch, fmt, damping=0.01):
    """`(w_hat, eta, D_O, D_I)` in float64, tile after tile from the top left."""
    s, t = fmt.tile
    (O, I), (H_I, H_O) = w.shape, (np.asarray(H, np.float64) for H in sketch)
    U_I, D_I = block_ldl(H_I + damping * np.mean(np.diag(H_I)) * np.eye(I), t, upper=True)
    U_O, D_O = block_ldl(H_O + damping * np.mean(np.diag(H_O)) * np.eye(O), s, upper=True)
    stored, round_ = fmt.stored(fmt.fitted(jnp.asarray(w))), jax.jit(fmt.round_block)
    out, d, eta = np.zeros(w.shape), np.zeros(w.shape), np.zeros(w.shape)
    for i, j in itertools.product(range(0, O, s), range(0, I, t)):
        r, c = slice(i, i + s), slice(j, j + t)
        goal = w[r, c] + U_O[: i + s, r].T @ d[: i + s, : j + t] @ U_I[: j + t, c]
        at = stored if fmt.tile != (1, 1) else {k: a[r] for k, a in fmt.params_at(stored, j, I).items()}
        out[r, c] = round_(jnp.asarray(goal, jnp.float32), at)[1]
        d[r, c], eta[r, c] = w[r, c] - out[r, c], goal - out[r, c]
    return out, eta, D_O, D_I


@pytest.mark.parametrize("fmt", [formats.get("int3:g8"), Tiles()], ids=lambda f: f.name)
def test_equals_the_definition(fmt):
    r = yaqa(W, BOTH, fmt)
    want, eta, D_O, D_I = definition(W, BOTH, fmt)
    assert np.mean(np.asarray(r.w_hat_OI) == want) > 0.97
    np.testing.assert_array_equal(r.q.decode(), r.w_hat_OI)
    assert two_sided(r.w_hat_OI) == pytest.approx(two_sided(want), rel=0.02)
    assert r.error == pytest.approx(two_sided(r.w_hat_OI), rel=1e-6)
    # tr(H_O d H_I d^T) = tr(D_O eta D_I eta^T), both Hessians damped.
    damped = Sketch(*(H + 0.01 * np.mean(np.diag(H)) * np.eye(len(H)) for H in BOTH))
    parts = eta.reshape(-1, fmt.tile[0], I // fmt.tile[1], fmt.tile[1])
    total = np.einsum("msng,mst,ngh,mtnh->", parts, D_O, D_I, parts)
    assert total == pytest.approx(two_sided(want, damped), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (96, 64)])
def test_without_an_output_side_it_is_ldlq(shape):
    """More rows than columns, and several blocks of 32 each way; to the bit, where both fit beforehand."""
    w = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    sketch = Sketch(correlated(shape[1], 1), np.eye(shape[0], dtype=np.float32))
    for fmt in (formats.get("int2:channel:midrise"), Tiles()):
        a, b = gptq(w, sketch.H_II, fmt), yaqa(w, sketch, fmt)
        assert np.mean(np.asarray(a.w_hat_OI) == np.asarray(b.w_hat_OI)) > 0.995
        assert b.error == pytest.approx(a.error, rel=0.01)


def test_less_two_sided_error_than_feedback_on_one_side():
    fmt, ratios = formats.get("int3:channel"), []
    for seed in range(4):
        w = np.random.default_rng(seed).standard_normal((O, I)).astype(np.float32)
        ratios.append(two_sided(yaqa(w, BOTH, fmt).w_hat_OI, w=w) / two_sided(gptq(w, BOTH.H_II, fmt).w_hat_OI, w=w))
    assert np.mean(ratios) < 0.8


@pytest.mark.parametrize("inner", [formats.get("int2:channel:midrise"), Tiles()], ids=lambda f: f.name)
def test_rotated_formats(inner):
    fmt = Incoherent(inner=inner)
    r = yaqa(W, BOTH, fmt)
    np.testing.assert_array_equal(r.q.decode(), r.w_hat_OI)
    assert r.error == pytest.approx(two_sided(r.w_hat_OI), rel=1e-3)
    assert r.error < 0.7 * two_sided(fmt.encode(jnp.asarray(W)).decode())


def test_bad_input():
    fmt = formats.get("int3:channel")
    with pytest.raises(InputError, match="Hessian of the inputs of x.y holds NaN"):
        yaqa(W, BOTH._replace(H_II=np.where(np.eye(I) == 1, np.nan, BOTH.H_II)), fmt, name="x.y")
    with pytest.raises(InputError, match=r"output Hessian of x.y has shape \[11, 11\] \(allowed: \[12, 12\]"):
        yaqa(W, BOTH._replace(H_OO=BOTH.H_OO[:11, :11]), fmt, name="x.y")
    with pytest.raises(InputError, match="x.y holds NaN"):
        yaqa(np.where(W > 2, np.inf, W), BOTH, fmt, name="x.y")
    r = yaqa(W, Sketch(np.ones((I, I), np.float32), np.ones((O, O), np.float32)), fmt, damping=0.0)
    assert 0 < r.damping <= 0.1
    dead = BOTH.H_II.copy()
    dead[[2, 5]] = dead[:, [2, 5]] = 0
    assert yaqa(W, BOTH._replace(H_II=dead), fmt).dead == 2


# -- on a model -------------------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(3, 61, (3, 12)).astype(np.int32)
PATHS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


def gradients(model, path, seed=0):
    """Of each sequence's cross-entropy with labels drawn from the model, summed token by token in float64."""

    @jax.jit
    def grads(w, row, i):
        drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(seed), i), logits(w, row))
        return jax.lax.map(lambda t: jax.grad(lambda w: -jax.nn.log_softmax(logits(w, row)[t])[drawn[t]])(w), at)

    def logits(w, row):
        tree = trees.map_leaves(lambda p, a: w if p == path else a, model.params)
        return forward(tree, row[None], model.config)[0]

    w, at = trees.get(model.params, path), jnp.arange(TOKENS.shape[1])
    return [np.mean(np.asarray(grads(w, row, i), np.float64), axis=0) for i, row in enumerate(TOKENS)]


def test_sketches_are_sums_of_gradients():
    model = tiny(num_layers=2)
    found = sketches(model.config, model.params, PATHS, TOKENS)
    path = PATHS[1]
    each = gradients(model, path)
    H_I, H_O = sum(g.T @ g for g in each), sum(g @ g.T for g in each)
    np.testing.assert_allclose(found[path].H_II, H_I / np.mean(np.diag(H_I)), atol=2e-3)
    np.testing.assert_allclose(found[path].H_OO, H_O / np.mean(np.diag(H_O)), atol=2e-3)
    twice = sketches(model.config, model.params, PATHS, TOKENS, rounds=2)[path]
    first = {k: np.asarray(a, np.float64) for k, a in found[path]._asdict().items()}
    H_I, H_O = sum(g.T @ first["H_OO"] @ g for g in each), sum(g @ first["H_II"] @ g.T for g in each)
    np.testing.assert_allclose(twice.H_II, H_I / np.mean(np.diag(H_I)), atol=2e-3)
    np.testing.assert_allclose(twice.H_OO, H_O / np.mean(np.diag(H_O)), atol=2e-3)


def test_weights_that_get_no_gradient_are_refused():
    model = tiny(num_layers=1)
    path = "model.layers.0.self_attn.o_proj"
    params = trees.map_leaves(lambda p, a: a * 0 if p.endswith("v_proj") else a, model.params)
    with pytest.raises(InputError, match=f"gradient of {path} is 0 on all of the text"):
        sketches(model.config, params, (path,), TOKENS[:1])


def test_text_is_needed():
    model = tiny(num_layers=1)
    with pytest.raises(InputError, match="solver yaqa without calibration text"):
        solvers.get("yaqa").quantize(model, Plan.uniform("int4").resolve(model.config.shapes()))
    assert not any(isinstance(a, QTensor) for _, a in trees.items(model.params))


TEXT = ["The quick brown fox jumps over the lazy dog. " * 8, "Pack my box with five dozen liquor jugs! " * 8]


@pytest.mark.parametrize(
    "solver, fmt",
    [
        ("yaqa", "rht:int4:g32"),
        pytest.param("ldlq", "rht:int4:g32", marks=pytest.mark.slow),
        pytest.param("guided", "int4:g32", marks=pytest.mark.slow),
    ],
)
def test_folder_equals_memory_and_resumes(solver, fmt, tmp_path, capsys):
    """Weights through a folder, an interruption and the command, to the bits of the model in memory."""
    m = byte_model(hidden_size=64, intermediate_size=64, head_dim=16, num_kv_heads=4, num_layers=1)
    save_hf(m, tmp_path / "src")
    m, solve = load_hf(tmp_path / "src"), solvers.get(solver)
    plan, options = Plan.uniform(fmt), {"rows": 3, "length": 32}
    text = "".join(TEXT)
    wanted = dict(trees.items(solve.quantize(m, plan.resolve(m.config.shapes()), [text], **options)))
    with pytest.raises(Interrupted):
        solve.quantize_dir(tmp_path / "src", plan, tmp_path / "out", interrupt_at(2), [text], **options)
    solve.quantize_dir(tmp_path / "src", plan, tmp_path / "out", None, [text], **options)
    same(dict(trees.items(load_hf(tmp_path / "out").params)), wanted)
    (tmp_path / "calib.txt").write_text(text)
    args = ["quantize", str(tmp_path / "src"), "--format", fmt, "--solver", solver, "--out"]
    args += [str(tmp_path / "again"), "--calib", str(tmp_path / "calib.txt"), f"--{solver}.length", "32"]
    assert main([*args, f"--{solver}.rows", "5000"]) == 2 and "needed: 160000 tokens" in capsys.readouterr().err
    assert main([*args, f"--{solver}.rows", "3", "--json"]) == 0
    for name in ("out", "again"):
        assert (tmp_path / name / "config.json").exists()
    a, b = (sorted((tmp_path / n).glob("*.safetensors")) for n in ("out", "again"))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
