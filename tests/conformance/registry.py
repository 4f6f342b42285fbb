"""Every registered format by name, which of them run by default, and what they give on the battery of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SHAPE, same_bits, same_tree, weights

from lowbit.formats import base
from lowbit.formats.base import QTensor
from lowbit.formats.dorefa import DoReFa
from lowbit.formats.uniform import Uniform

NAMES = base.names()
W = weights()
X = np.random.default_rng(1).standard_normal((3, SHAPE[1])).astype(np.float32)
# Formats that add no pair of choices to the others run with `-m slow` only.
SPARE = """f32 int1:channel:paretoq ternary:channel:paretoq-compat
int2:g64 int2:g64:mse int3:g64 ternary:channel ternary:g64:lsq ternary:tensor:f32 q4_0:mse:lsq
q2_0:mse q5_0:mse:clip q2_k q2_k:absmax:lsq q3_k q4_k:lsq q5_k q5_k:absmax:rounded q6_k mxfp4:lsq nf2 nf4
aqlm:1x8:g8 aqlm:3x3:g4 vptq:v4:k16 vptq:v4:k16:r32 vptq:v4:k16:s gptvq:v1:k4:c64:n4 nuq1 nuq3 nuq4
e8p3:rho0.98:r2.04 trellis2:1mad:l10 trellis4:latin:l10
rht:rows:ternary:channel rht128:blocks:int2:channel:midrise""".split()
# The laws that compile large programs run over one format of each code path by default, `most` not over those above.
MOST = """bf16 int1:g64 int2:g64:midrise:mse:paretoq ternary:channel:paretoq
int2:tensor:asym:mse int3:g64:asym:rounded int4:g64 int4:g64:clip:bf16 ternary:tensor
q4_0 q4_1 tq1_0 q4_k q6_k:absmax:fixed2 mxfp4:mse:clip nf4:dq
aqlm:2x4:g4 nuq2 e8p2 trellis2:hyb:l10""".split()
REST = [n for n in NAMES if n not in MOST]


def over(names: list[str], slow: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]
    )


every, everyone = over(NAMES, SPARE), over(NAMES, REST)
most = over([n for n in NAMES if n not in SPARE], REST)
# DoReFa's gradient goes through tanh: tests/qat/test_recipes.py.
uniform = over([n for n in NAMES if isinstance(base.get(n), Uniform) and not isinstance(base.get(n), DoReFa)], SPARE)


@functools.cache
def encoded(name: str, what: str) -> QTensor:
    return base.get(name).encode(jnp.asarray(W[what]))


def by_operation(fmt: base.Format, w: jax.Array, params: base.Params) -> tuple[dict, jax.Array, jax.Array]:
    """Encode, decode and fake-quantize one operation at a time: what eager execution really means."""
    stored = fmt.stored(params)
    codes = fmt.quantize(w.astype(jnp.float32), stored)
    arrays = fmt.pack(codes, stored)
    codes_back, stored_back = fmt.unpack(arrays, w.shape)
    assert codes.dtype == jnp.int32 and same_bits(codes, codes_back) and same_tree(stored, stored_back)
    return arrays, fmt.dequantize(codes_back, stored_back).astype(w.dtype), fmt.fake_quant(w, params)
