"""Run by `test_laws.test_mesh` in a process with 8 simulated devices; prints the names, of those given, that passed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from battery import same_bits, same_tree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowbit.formats import base
from lowbit.kernels.qdot import qdot

assert len(jax.devices()) == 8, jax.devices()
mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto, AxisType.Auto))
rng = np.random.default_rng(0)
w = jnp.asarray(rng.standard_normal((16, 1024)).astype(np.float32) * 0.02)
x = jnp.asarray(rng.standard_normal((3, 1024)).astype(np.float32))


def put(a):
    """Split over whichever mesh axes divide it."""
    axes = [n if a.shape[i] % size == 0 else None for i, (n, size) in enumerate((("rows", 4), ("columns", 2)))]
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))


@jax.jit
def use(q, x):
    return q.decode(), qdot(x, q)


for name in sys.argv[1:]:
    fmt = base.get(name)
    q = fmt.encode(w)
    want = q.decode()
    split = jax.tree.map(put, q)
    assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(split)), name
    got, y_split = use(split, x)
    assert same_bits(got, want), f"{name}: decode on a mesh"
    np.testing.assert_allclose(y_split, np.asarray(x) @ np.asarray(want).T, rtol=1e-4, atol=1e-5)
    on_mesh = jax.jit(fmt.encode)(put(w))
    assert same_tree(on_mesh.arrays, q.arrays), f"{name}: encode on a mesh"
    print(name, flush=True)
