"""NormalFloat: its levels, its rounding, double quantization, and the gradient of a trained absmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats import base
from lowbit.formats.base import FormatError
from lowbit.formats.normal_float import LEVELS

# bitsandbytes' table (get_4bit_type("nf4")), which QLoRA's Appendix E prints too.
PUBLISHED = np.float32(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
W = np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32)


def test_levels():
    assert LEVELS[4].tobytes() == PUBLISHED.tobytes()
    for bits, levels in LEVELS.items():
        assert len(levels) == 2**bits and levels.dtype == np.float32 and (np.diff(levels) > 0).all()
        assert levels[0] == -1 and levels[-1] == 1 and levels[2 ** (bits - 1) - 1] == 0


@pytest.mark.parametrize("name", ["nf4", "nf2", "nf3:g32"])
def test_nearest_level_and_the_absmax(name: str):
    """By brute force over the levels; the largest weight of a block is exact, and so is 0."""
    fmt = base.get(name)
    w = W.copy()
    w[0, 3] = 0.0
    q = fmt.encode(jnp.asarray(w))
    codes, stored = (np.asarray(a) for a in (base.unpacked(q)[0], base.unpacked(q)[1]["scale"]))
    blocks = w.reshape(300, -1, fmt.block)
    assert (stored == np.abs(blocks).max(-1)).all()
    ratio = (blocks / stored[..., None]).reshape(w.shape)
    far = np.abs(ratio[..., None].astype(np.float64) - LEVELS[fmt.width])
    best = far.min(-1)
    assert (np.take_along_axis(far, codes[..., None], -1)[..., 0] <= best + 1e-7).all()
    hat = np.asarray(q.decode())
    top = np.take_along_axis(w.reshape(-1, fmt.block), np.abs(blocks).argmax(-1).reshape(-1, 1), -1)
    chosen = np.take_along_axis(hat.reshape(-1, fmt.block), np.abs(blocks).argmax(-1).reshape(-1, 1), -1)
    assert (chosen == top)[np.abs(top) == top].all() and hat[0, 3] == 0
    if fmt.width == 4:
        assert (np.abs(chosen) == np.abs(top)).all()


def test_a_weight_on_a_midpoint_takes_the_lower_level():
    middle = (LEVELS[4][1:] + LEVELS[4][:-1]) * np.float32(0.5)
    w = np.zeros((1, 64), np.float32)
    w[0, :15], w[0, 15] = middle, 1.0
    up = w.copy()
    up[0, :15] = np.nextafter(middle, np.float32(2))
    codes = [np.asarray(base.unpacked(base.get("nf4").encode(jnp.asarray(a)))[0][0, :15]) for a in (w, up)]
    assert (codes[0] == np.arange(15)).all() and (codes[1] == np.arange(1, 16)).all()


def test_decoding_is_that_of_bitsandbytes():
    """Its kernels, in numpy: `map[code] * nested_absmax + offset`, then `level * absmax`, float32, each rounded. A
    step is its nested absmax / 128 and the map (code - 128) / 128; its blocks lie along rows, ours along columns."""
    plain, double = (base.get(n).encode(jnp.asarray(W)) for n in ("nf4", "nf4:dq"))
    for q in (plain, double):
        a = {k: np.asarray(v) for k, v in q.arrays.items()}
        codes = np.stack([a["codes"] & 15, a["codes"] >> 4], -1).reshape(W.shape)
        absmax = a["scale"]
        if q is double:
            assert a["scale"].dtype == np.uint8 and a["step"].shape == (2, 2) and a["offset"].shape == (1, 1)
            table = (np.arange(256, dtype=np.float32) - 128) / np.float32(128)
            absmax = table[a["scale"]] * np.repeat(128 * a["step"], 256, axis=0)[:300] + a["offset"]
            true = np.abs(W.reshape(300, 2, 64)).max(-1)
            assert abs(a["offset"][0, 0] / true.mean() - 1) < 1e-5
            assert (np.abs(absmax - true) <= np.repeat(a["step"], 256, axis=0)[:300] * 0.501).all()
        assert (PUBLISHED[codes] * np.repeat(absmax, 64, axis=1)).tobytes() == np.asarray(q.decode()).tobytes()
    error = [float(np.square(np.asarray(q.decode()) - W).mean()) for q in (plain, double)]
    assert error[0] < error[1] < 1.01 * error[0]


def test_declared_bits_of_a_large_matrix():
    for name, bits in (("nf4", 4.5), ("nf4:dq", 4 + 8 / 64 + 32 / (64 * 256)), ("nf2:g32:dq", 2 + 8 / 32 + 1 / 256)):
        q = jax.eval_shape(base.get(name).encode, jax.ShapeDtypeStruct((4096, 4096), "f4"))
        assert q.bits_per_weight == pytest.approx(bits, abs=3e-6)


def test_error_of_normal_weights():
    """NF4 is below the integers at the same size on normal weights; by quadrature for a fixed absmax."""
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((64, 4096)).astype(np.float32))
    rms = {n: float(jnp.sqrt(jnp.mean(jnp.square(base.get(n).encode(w).decode() - w)))) for n in ("nf4", "int4:g64")}
    assert 0.085 < rms["nf4"] < 0.095 and rms["nf4"] < 0.95 * rms["int4:g64"]


@pytest.mark.parametrize("name", ["nf4", "nf3:g32:dq"])
def test_gradient_law(name: str):
    """The identity for every weight; for the absmax `level - w/s`, and the level beyond the ends."""
    fmt = base.get(name)
    g = np.random.default_rng(2).standard_normal(W.shape).astype(np.float32)
    params = base._init(fmt, jnp.asarray(W))
    params = {**params, "scale": params["scale"] * 0.8}

    @jax.jit
    def run(w, params):
        value, pull = jax.vjp(fmt.fake_quant, w, params)
        return value, *pull(jnp.asarray(g)), fmt.stored(params)

    value, gw, gp, stored = run(jnp.asarray(W), params)
    assert (gw == g).all() and fmt.gradient_fraction(jnp.asarray(W), params) == 1
    s = np.repeat(np.asarray(stored["scale"], np.float64), fmt.block, axis=1)
    ratio, level = W / s, np.asarray(value) / s
    each = g * (level - np.where(np.abs(ratio) <= 1, ratio, 0))
    assert (np.abs(ratio) > 1).any()
    want = each.reshape(300, -1, fmt.block).sum(-1)
    np.testing.assert_allclose(gp["scale"], want, rtol=1e-4, atol=1e-4)
    assert all((np.asarray(gp[k]) == 0).all() for k in gp.keys() - {"scale"})


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(FormatError, match=r"nf4:dq: weight of shape \(4, 100\) \(rows must be a multiple of 64 long\)"):
        base.get("nf4:dq").encode(jnp.ones((4, 100)))
