"""What a training step needs, before anything is allocated."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowbit.train import sharding
from lowbit.train.config import TrainConfig
from lowbit.train.objective import Objective
from lowbit.train.params import Flat, Layout, flatten
from lowbit.train.step import Wrap, abstract, build
from lowbit.tree import Tree


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. Arguments are exact; temporaries are what this backend's compiler plans."""

    params: int
    optimizer: int
    arguments: int
    temporaries: int
    flops: float  # of one step on each device
    whole: tuple[str, ...]  # parameters that the mesh could not split


def estimate(
    make_params: Callable[[], Tree],
    batch: Mapping[str, tuple[tuple[int, ...], Any]],
    objective: Objective,
    config: TrainConfig,
    make_teacher: Callable[[], Tree] | None = None,
    wrap: Wrap | None = None,
) -> Memory:
    """Memory of a training step, from compiling it; nothing is allocated.

    `make_params` and `make_teacher` are traced, not run; `batch` is `{name: (shape, dtype)}`. The mesh needs its
    devices to exist: simulate them with `XLA_FLAGS=--xla_force_host_platform_device_count=N`.
    """
    flat, layout = _abstract(make_params)
    goal, goal_layout = _abstract(make_teacher) if make_teacher else ({}, {})
    setup = build(flat, layout, goal, goal_layout, objective, config, wrap)
    mesh = setup.sharding.mesh
    goal_where = sharding.shard(goal, mesh)
    learned = {n: jax.ShapeDtypeStruct(a.shape, jnp.float32) for n, a in setup.learned.items()}
    learned = abstract(learned, {n: setup.sharding.of(n) for n in learned})
    frozen = abstract(setup.frozen, {n: setup.sharding.of(n) for n in setup.frozen})
    goal = abstract(goal, {n: goal_where.of(n) for n in goal})
    opt = abstract(setup.opt_shape, setup.opt_sharding)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    parts = {n: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for n, (shape, dtype) in batch.items()}
    compiled = setup.step.lower(learned, opt, frozen, goal, parts).compile()
    plan, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Memory(
        params=_device_bytes(learned) + _device_bytes(frozen),
        optimizer=_device_bytes(opt),
        arguments=plan.argument_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
        flops=float((cost or {}).get("flops", 0.0)),
        whole=setup.sharding.whole + goal_where.whole,
    )


def _abstract(make: Callable[[], Tree]) -> tuple[Flat, Layout]:
    found: list[Layout] = []

    def traced() -> Flat:
        flat, layout = flatten(make())
        found.append(layout)
        return flat

    return jax.eval_shape(traced), found[0]


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
