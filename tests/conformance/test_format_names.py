"""Names of formats, and what is refused (law 8), over the registry."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import NAMES, SPARE, W, encoded, everyone, uniform

from lowbit.formats import base
from lowbit.formats.base import FormatError
from lowbit.formats.integer import Integer

# -- names and registry -----------------------------------------------------------------------------------------------


def test_names_are_canonical_and_parse_back():
    assert len(set(NAMES)) == len(NAMES) > 50
    for name in NAMES:
        fmt = base.get(name)
        assert fmt.name == name and base.get(f" {name.upper()} ") == fmt and hash(base.get(name)) == hash(fmt)


def test_integer_examples_cover_every_pair():
    """Width, zero point, granularity and calibration, two by two; symmetric int1 has one calibration only."""
    grids = [f for f in map(base.get, NAMES) if isinstance(f, Integer) and f.name not in SPARE]
    kinds = [(f.width, f.asym, f.granularity if isinstance(f.granularity, str) else "group", f.searched) for f in grids]
    choices = (range(1, 9), (False, True), ("tensor", "channel", "group"), (False, True))
    for a, b in itertools.combinations(range(4), 2):
        missing = set(itertools.product(choices[a], choices[b])) - {(k[a], k[b]) for k in kinds}
        assert not missing


@pytest.mark.parametrize(
    "spelled, canonical",
    [
        ("int4", "int4:channel"),
        ("int4:asym:g64", "int4:g64:asym"),
        ("int1:minmax:asym", "int1:channel:asym"),
        ("int8:fp16:tensor:absmax", "int8:tensor"),
        ("int4:bf16:clip:mse:g32:asym", "int4:g32:asym:mse:clip:bf16"),
        ("int2:g64:fixed0.50", "int2:g64:fixed0.5"),
        ("ternary", "ternary:tensor"),
        ("q4_0:lsq:mse", "q4_0:mse:lsq"),
        ("int2:midrise:paretoq", "int2:channel:midrise:paretoq"),
        ("ternary:paretoq-compat", "ternary:tensor:paretoq-compat"),
        ("q4_k:clip:absmax", "q4_k:absmax:clip"),
        ("trellis2.5:l16:v1:mcg", "trellis2.5:mcg"),
        ("trellis3:qtip:v2:l12:hyb", "trellis3:hyb:l12:qtip"),
        ("trellis2:v2:lut", "trellis2:lut:v2"),
        ("mxfp4:fixed1:mse", "mxfp4:mse:fixed1"),
        ("aqlm:g4:2x8", "aqlm:2x8:g4"),
        ("aqlm", "aqlm:1x8:g8"),
        ("vptq:s:r16:k256:v8", "vptq:v8:k256:r16:s"),
        ("gptvq", "gptvq:v4:k16:c256"),
        ("e8p4:mse:r3.750:rho0.89", "e8p4:mse"),
    ],
)
def test_other_spellings(spelled: str, canonical: str):
    assert base.get(spelled).name == canonical and base.get(canonical) == base.get(spelled)


# -- law 8: refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("int9", r"unknown format 'int9'; did you mean 'int\d.*'\? \(allowed: .*int8.*"),
        ("itn4:g64", r"unknown format 'itn4:g64'"),
        ("q4_k_m", r"unknown format 'q4_k_m'; did you mean 'q4_k'"),
        ("q4_k:mse", r"unknown key of q4_k 'mse' \(allowed: absmax, clip, .*"),
        ("mxfp4:g32", r"unknown key of mxfp4 'g32'"),
        ("int4:g0", r"unknown key of int4 'g0' .allowed: absmax, asym"),
        ("int4:g-3", r"unknown key of int4 'g-3'"),
        ("int4:", r"unknown key of int4 ''"),
        ("int4:chanel", r"unknown key of int4 'chanel'; did you mean 'channel'\? \(allowed: .*\)"),
        ("int4:g64:g32", r"int4: key 'g32' gives a second granularity"),
        ("int1:asym:absmean", r"calibration 'absmean' of asymmetric int1 \(allowed: minmax, mse\)"),
        ("int1:mse", r"calibration 'mse' of int1 \(allowed: absmean\)"),
        ("int4:absmean", r"calibration 'absmean' of int4 \(allowed: absmax, signmax, minmax, mse, signmse\)"),
        ("int4:asym:absmax", r"calibration 'absmax' of asymmetric int4 \(allowed: minmax, mse\)"),
        ("ternary:asym", r"unknown key of ternary 'asym'"),
        ("q4_0:g64", r"unknown key of q4_0 'g64'"),
        ("q4_1:absmax", r"unknown key of q4_1 'absmax'"),
        ("nf4:mse", r"unknown key of nf4 'mse' \(allowed: dq, g64\)"),
        ("nf4:g32:g64", r"nf4: key 'g64' gives a second block"),
        ("e8p2:r2", r"unknown key of e8p2 'r2' \(allowed: mse, rho1.03\)"),
        ("e8p3:rho", r"unknown key of e8p3 'rho'; did you mean 'rho1.0'\? \(allowed: mse, r1.84, rho1.0\)"),
        ("e8p3:r1.9:r2", r"e8p3: key 'r2' gives a second residual \(allowed: one\)"),
        ("e8p4:rho0", r"e8p4: rho 0 \(allowed: 0.1 to 10\)"),
        ("e8p4:r0.5", r"e8p4: residual 0.5 \(allowed: 1 to 16\)"),
        ("e8p5", r"unknown format 'e8p5'; did you mean 'e8p\d'"),
        ("trellis2", r"trellis2 without a code \(allowed: 1mad, 3inst, mcg, mul1, hyb, lut, latin\)"),
        ("trellis9:mcg", r"unknown format 'trellis9:mcg'; did you mean 'trellis\d"),
        ("trellis2:mgc", r"unknown key of trellis2 'mgc'; did you mean 'mcg'"),
        ("trellis2:mcg:v2", r"trellis2: v2 of code 'mcg' \(allowed: v1\)"),
        ("trellis2:mcg:hyb", r"trellis2: key 'hyb' gives a second code"),
        ("trellis5:hyb", r"trellis5: steps of 2 values and 10 bits \(allowed: up to 8 bits\)"),
        ("trellis2:mcg:l3", r"trellis2: l3 \(allowed: l4 to l20\)"),
        ("nf5", r"unknown format 'nf5'; did you mean 'nf\d'"),
        ("aqlm:2x8:g8:g4", r"aqlm: key 'g4' gives a second vector length"),
        ("aqlm:1x17", r"aqlm: 1x17 \(allowed: 1 to 8 codebooks of 1 to 16 bits\)"),
        ("vptq:v4:k100", r"vptq: codebook of 100 vectors \(allowed: powers of two, 2 to 65536\)"),
        ("vptq:v8:k65536:r65536", r"vptq: 32 bits of codes for a vector \(allowed: at most 24\)"),
        ("vptq:k4:k4", r"vptq: key 'k4' gives a second k"),
        ("vptq:c64", r"unknown key of vptq 'c64'"),
        ("gptvq:v2:k4:n3", r"gptvq: codebooks for 3 rows \(allowed: multiples of 2\)"),
        ("nuq2:g64", r"unknown key 'g64' of nuq2 \(allowed: none\)"),
        ("bf16:g64", r"unknown key 'g64' of bf16 \(allowed: none\)"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str):
    with pytest.raises(FormatError, match=message) as e:
        base.get(name)
    assert "\n" not in str(e.value)


@uniform
def test_rows_that_do_not_divide_are_refused(name: str):
    fmt = base.get(name)
    group = fmt.params_span((4, 100))
    if 100 % group == 0:
        assert jax.eval_shape(fmt.encode, jnp.ones((4, 100))).shape == (4, 100)
        return
    for f in (fmt.encode, fmt.fake_quant, jax.jit(fmt.encode)):
        with pytest.raises(FormatError, match=rf"{name}: weight of shape \(4, 100\).*multiple of {group} long"):
            f(jnp.ones((4, 100)))


@everyone
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float):
    w = W["normal"].copy()
    w[3, 17] = bad
    with pytest.raises(FormatError, match=rf"{name}: weight \[3, 17\] is {bad} \(must be finite\)"):
        base.get(name).encode(jnp.asarray(w))


@pytest.mark.parametrize(
    "name", ["int4:g64", "int1:g64", "ternary:tensor", "q8_0", "q4_0", "q4_1", "tq2_0", "q4_k", "q2_k:absmax"]
)
def test_scale_overflow_is_refused(name: str):
    with pytest.raises(FormatError, match=rf"{name}: (scale|min) of magnitude .* \(largest in fp16: 65504\)"):
        base.get(name).encode(jnp.asarray(W["normal"] * 1e9))


@uniform
def test_scales_never_underflow(name: str):
    for what in ("tiny", "zeros"):
        q = encoded(name, what)
        scale = q.format.grid(base.unpacked(q)[1])["scale"]
        least = 2.0**-100 if "f32" in name or "bf16" in name or "mxfp4" in name else 2.0**-24
        assert (np.abs(np.asarray(scale)) >= least).all()
