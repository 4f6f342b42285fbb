"""`rht:INNER`: bits in every program, gradients of sign vectors, names and refusals; the laws are in conformance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats import base
from lowbit.formats.base import Coded, FormatError, Latent
from lowbit.vq.incoherent import Incoherent
from tests.conformance.battery import same_bits, same_tree

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "name, canonical",
    [
        ("rht:int2:asym:g64", "rht:int2:g64:asym"),
        ("rht:f16:dct:int2", "rht:dct:f16:int2:channel"),
        ("rht128:seed7:nf4", "rht128:seed7:nf4"),
        ("rht:seed0:ternary", "rht:ternary:tensor"),
        ("rht128:f16:blocks:q4_k", "rht128:blocks:f16:q4_k"),
    ],
)
def test_names(name, canonical):
    fmt = base.get(name)
    assert isinstance(fmt, Incoherent) and fmt.name == canonical and base.get(canonical) == fmt


@pytest.mark.parametrize(
    "name, message",
    [
        ("rht", r"rht without an inner format \(allowed: rht:INNER"),
        ("rht:f16", "rht without an inner format"),
        ("rht:int9", "unknown format 'int9'"),
        ("rht:int2:g0", "unknown key of int2 'g0'"),
        ("rht:rht:int2", "rht around 'rht:int2:channel'"),
        ("rht:f16:f16:int2", "key 'f16' gives a second trained"),
        ("rht:dct:blocks:int2", "key 'blocks' gives a second fallback"),
        ("rht128:dct:int2", "unknown key of rht128 'dct'"),
        ("rth:int2", "unknown format 'rth:int2'; did you mean 'rht"),
    ],
)
def test_names_that_cannot_be(name, message):
    with pytest.raises(FormatError, match=message) as e:
        base.get(name)
    assert "\n" not in str(e.value)


def test_shapes_that_cannot_be():
    with pytest.raises(
        FormatError, match=r"rht:int2:channel: .*\(8, 107\).*order 107.*as a key: rht:dct or rht:blocks"
    ):
        base.get("rht:int2").check((8, 107))
    with pytest.raises(FormatError, match=r"rht128:int2:channel: .*192.*as a key: rht128:blocks"):
        base.get("rht128:int2").check((128, 192))
    with pytest.raises(FormatError, match="multiple of 64 long"):
        base.get("rht:int2:g64").check((8, 96))
    for name in ("rht:dct:int2", "rht128:blocks:int2"):
        base.get(name).check((8, 107))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("rht:int4:g32:f32", (12, 96)),  # products of inner codes and scales that are not exact
        pytest.param("rht:dct:f16:int3:g8:mse", (20, 104), marks=pytest.mark.slow),  # a DCT's products
        # A core that is not symmetric, an addition in the inner decoder.
        pytest.param("rht:f16:q4_k:absmax", (92, 256), marks=pytest.mark.slow),
    ],
)
def test_train_law_where_products_are_rounded(name, shape):
    """One operation at a time, jitted, and inside of a program that could contract the decoder's factors."""
    fmt = base.get(name)
    w = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    params = {k: a * RNG.uniform(0.7, 1.4, a.shape).astype(np.float32) for k, a in fmt.fitted(w).items()}
    stored = fmt.stored(params)
    codes = fmt.quantize(w, stored)
    arrays = fmt.pack(codes, stored)
    want = fmt.dequantize(*fmt.unpack(arrays, shape))

    @jax.jit
    def larger(w, params, q, x):
        values = q.decode(), Latent(w, params, fmt).value()
        return values, fmt.encode(w, params).arrays, [(x * v + x).sum() + (v + x).max() for v in values]

    q = fmt.encode(w, params)
    assert same_tree(q.arrays, arrays) and same_bits(q.decode(), want) and same_bits(fmt.fake_quant(w, params), want)
    values, inside, _ = larger(w, params, q, w[::-1])
    assert same_bits(values[0], want) and same_bits(values[1], want) and same_tree(inside, arrays)
    assert 0.01 < np.linalg.norm(want - w) / np.linalg.norm(w) < 0.6


def test_size_of_signs():
    w = jnp.zeros((24, 96))
    inner = jax.eval_shape(base.get("int2:g32").encode, w).nbytes
    assert jax.eval_shape(base.get("rht:int2:g32").encode, w).nbytes == inner + 3 + 12
    assert jax.eval_shape(base.get("rht:f16:int2:g32").encode, w).nbytes == inner + 2 * (24 + 96)


def test_gradients_of_sign_vectors():
    """Straight-through: the derivative of `s_V T^T (T (w / s_V / s_U) T^T + constant) T s_U`, by finite differences in
    float64; the weight's is the identity where the inner format has no clip policy."""
    shape = (8, 32)
    fmt = base.get("rht:f16:int3:g16")
    w = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    g = RNG.standard_normal(shape)
    params = fmt.fitted(w)
    for k in ("su", "sv"):
        params[k] = jnp.asarray(params[k] * RNG.uniform(0.5, 2, params[k].shape), jnp.float32)
    stored = fmt.stored(params)

    @jax.jit
    def run(w, params):
        value, pull = jax.vjp(fmt.fake_quant, w, params)
        return value, fmt.enter(w, stored), *pull(jnp.asarray(g, jnp.float32))

    value, inside, gw, gp = run(w, params)
    np.testing.assert_array_equal(gw, g.astype(np.float32))
    rows, columns = (t.dense() for t in (fmt.space(shape).rows, fmt.space(shape).columns))
    own = {k: np.asarray(stored[k], np.float64) for k in ("su", "sv")}
    constant = rows @ (np.asarray(value, np.float64) / own["sv"] / own["su"]) @ columns.T - np.asarray(inside)

    def surrogate(su, sv):
        moved = rows @ (np.asarray(w, np.float64) / sv / su) @ columns.T + constant
        return np.sum(g * sv * (rows.T @ moved @ columns) * su)

    for k in own:
        for i in range(own[k].size):
            step = np.zeros(own[k].size)
            step[i] = 1e-5
            up, down = ({**own, k: own[k] + s * step.reshape(own[k].shape)} for s in (1, -1))
            slope = (surrogate(**up) - surrogate(**down)) / 2e-5
            assert np.asarray(gp[k]).reshape(-1)[i] == pytest.approx(slope, rel=2e-3, abs=2e-3)
    bits = base.get("rht:int3:g16")
    _, pull = jax.vjp(jax.jit(bits.fake_quant), w, bits.fitted(w))
    gp = pull(jnp.asarray(g, jnp.float32))[1]
    assert not np.asarray(gp["su"]).any() and not np.asarray(gp["sv"]).any() and np.asarray(gp["scale"]).all()


def test_clipped_weights_pass_their_gradient_in_the_rotated_space():
    fmt = base.get("rht:int2:channel:clip")
    w, g = (jnp.asarray(RNG.standard_normal((16, 64)), jnp.float32) for _ in range(2))
    params = {**fmt.fitted(w), "scale": jnp.full((16, 1), 0.4)}
    gw = jax.jit(lambda w, p: jax.vjp(fmt.fake_quant, w, p)[1](g)[0])(w, params)
    own = fmt.signs(w)
    inside, g_inside = (jax.jit(fmt.enter)(a, own) for a in (w, g))
    passed = np.abs(np.asarray(inside) / 0.4 + 0.5) <= 1.5
    assert 0.2 < passed.mean() < 0.9
    want = jax.jit(fmt.leave)(jnp.where(passed, g_inside, 0.0), own)
    np.testing.assert_allclose(gw, want, atol=1e-5)


def test_seeds_differ_and_the_same_input_has_the_same_signs():
    a, b = base.get("rht:int2"), base.get("rht:seed3:int2")
    w = jnp.ones((16, 64))
    own = a.signs(w)
    assert (own["su"] == a.signs(jnp.ones((32, 64)))["su"]).all() and (own["su"] != b.signs(w)["su"]).any()


def test_rows_takes_the_sizes_of_rows_out():
    """The rotated weight has rows as they were without their sizes, so errors follow these; zeros do no harm."""
    sizes = np.float32([0.03, 0.3, 1, 10] * 4)[:, None]
    w = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32) * sizes
    w[5] = 0

    def errors(name):
        hat = np.asarray(base.get(name).encode(jnp.asarray(w)).decode())
        assert np.isfinite(hat).all()
        return np.delete(np.square(hat - w).mean(1) / np.square(w).mean(1).clip(1e-30), 5)

    assert errors("rht:rows:e8p3").max() < 0.1 < 1 < errors("rht:f16:e8p3").max()
    assert base.get("rht:rows:seed2:int2").name == "rht:rows:seed2:int2:channel"


def test_values_that_cannot_be_stored():
    w = jnp.asarray(RNG.standard_normal((8, 64)), jnp.float32)
    fmt = base.get("rht:f16:int2")
    params = fmt.fitted(w)
    q = fmt.encode(w)
    coded = Coded.of(q)  # frozen codes whose inner scale is trained
    coded.check_values()
    assert same_tree(coded.encode().arrays, q.arrays) and same_bits(coded.value(), q.decode())
    with pytest.raises(FormatError, match="su of magnitude 1e"):
        fmt.encode(w, {**params, "su": params["su"] * 1e6})
    with pytest.raises(FormatError, match="int2:channel: scale of magnitude"):
        fmt.encode(w * 1e9)
