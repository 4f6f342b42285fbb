"""The hooks that solvers round blocks of columns with: a matrix rounded in blocks is the matrix rounded at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats import base as formats
from lowbit.ptq import base, rtn

SHAPE = (4, 512)
SEARCHED = "int4:g128:mse:f32"


def spanning():
    """Every registered format whose parameters lie within blocks of columns; by default one with a searched scale, and
    of each family the first without."""
    seen = set()
    for name in formats.names():
        fmt, family = formats.get(name), name.split(":")[0]
        if fmt.params_span(SHAPE) < SHAPE[1]:
            default = name == SEARCHED or not (getattr(fmt, "searched", False) or family in seen)
            yield pytest.param(name, marks=[] if default else [pytest.mark.slow])
            seen |= {family} if default else set()


@pytest.mark.parametrize("name", list(spanning()))
def test_blocks_of_columns_equal_the_whole_matrix(name):
    fmt = formats.get(name)
    w = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
    span = fmt.params_span(SHAPE)
    assert SHAPE[1] % span == 0
    blocks = [w[:, at : at + span] for at in range(0, SHAPE[1], span)]
    rounded = [fmt.round_block(b, fmt.fit_block(b)) for b in blocks]
    codes, w_hat = (jnp.concatenate(part, axis=1) for part in zip(*rounded))
    q = rtn.encode(fmt, w)
    np.testing.assert_array_equal(w_hat, q.decode())
    np.testing.assert_array_equal(codes, fmt.unpack(q.arrays, q.shape)[0])


def test_a_whole_matrix_is_one_block_of_the_others():
    fmt = formats.get("int4:channel")
    w = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)
    np.testing.assert_array_equal(fmt.round_block(w, fmt.fit_block(w))[1], rtn.encode(fmt, w).decode())


def test_registry():
    assert sorted(base.names()) == ["aqlm", "gptq", "guided", "ldlq", "lnq", "rtn", "vptq", "yaqa"]
    assert base.get("rtn").quantize_dir is rtn.quantize_dir
