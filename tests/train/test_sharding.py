"""Partition rules, and a (2, 2, 2) mesh of simulated devices against a single one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lowbit.errors import InputError
from lowbit.train import sharding

HERE = Path(__file__).parent
MESH = AbstractMesh((2, 2, 2), sharding.AXES)


def test_rules():
    shapes = {
        "model.embed_tokens": (64, 32),
        "lm_head": (64, 32),
        "model.norm": (32,),
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.self_attn.o_proj": (32, 32),
        "model.layers.0.self_attn.q_proj.bias": (32,),
        "model.layers.0.mlp.down_proj": (32, 48),
        "model.layers.0.mlp.down_proj:scale": (32, 3),
        "model.layers.0.mlp.up_proj:scale": (47, 1),
    }
    s = sharding.shard({n: jax.ShapeDtypeStruct(v, "float32") for n, v in shapes.items()}, MESH)
    P = PartitionSpec
    assert s.specs == {
        "model.embed_tokens": P("tensor", "fsdp"),
        "lm_head": P("tensor", "fsdp"),
        "model.norm": P(),
        "model.layers.0.self_attn.q_proj": P("tensor", "fsdp"),
        "model.layers.0.self_attn.o_proj": P("fsdp", "tensor"),
        "model.layers.0.self_attn.q_proj.bias": P(),
        "model.layers.0.mlp.down_proj": P("fsdp", "tensor"),
        "model.layers.0.mlp.down_proj:scale": P("fsdp", None),
        "model.layers.0.mlp.up_proj:scale": P(None, None),
    }
    assert s.whole == (
        "model.layers.0.mlp.down_proj:scale: 3 does not divide over 2 tensor devices",
        "model.layers.0.mlp.up_proj:scale: 47 does not divide over 2 tensor devices",
    )


def test_refusals():
    with pytest.raises(InputError, match="needs 4 devices .there are 1"):
        sharding.make_mesh((2, 2, 1))
    with pytest.raises(InputError, match="allowed: multiples of 8"):
        sharding.check_batch(12, 2, MESH)
    sharding.check_batch(16, 2, MESH)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mesh")
    out = {}
    for n in (8, 1):
        command = [sys.executable, str(HERE / "mesh_child.py"), str(n), str(directory)]
        p = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=600)
        assert p.returncode == 0, p.stderr
        out[n] = json.loads(p.stdout.splitlines()[-1])
        out[n]["grads"] = dict(np.load(directory / f"grads{n}.npz"))
    return out


@pytest.mark.slow
def test_first_step_agrees(runs):
    assert runs[8]["q_proj"] == ["tensor", "fsdp"] and runs[8]["whole"] == []  # it really was split
    assert runs[8]["loss"] == pytest.approx(runs[1]["loss"], rel=1e-5)
    for name, g in runs[1]["grads"].items():
        assert np.abs(g).max() > 0
        np.testing.assert_allclose(runs[8]["grads"][name], g, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_twenty_quantized_steps_agree(runs):
    assert len(runs[8]["curve"]) == 20
    np.testing.assert_allclose(runs[8]["curve"], runs[1]["curve"], rtol=1e-3)
    assert runs[1]["curve"][-1] < 0.9 * runs[1]["curve"][0]


@pytest.mark.slow
def test_codes_that_change_agree(runs):
    """A rounding may decide about a tile of 16 weights; nearly all are the same."""
    keys = ("loss_before", "loss_after", "loss", "codes_changed")
    one, eight = ([[r[k] for k in keys] for r in runs[n]["pv"] if "codes_changed" in r] for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=0.02)
    assert len(one) == 2 and one[0][3] > 0 and one[0][1] < one[0][0]


@pytest.mark.slow
def test_checkpoint_of_eight_devices_resumes_on_one(runs):
    assert runs[1]["moved"] == [21]
    assert 0 < runs[1]["drift"] < 0.01  # one step of 1e-3 beyond the run that never left its device


@pytest.mark.slow
def test_estimate_counts_bytes_per_device(runs):
    from models import CONFIG

    memory = runs[8]["memory"]
    norms = (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size
    split = (CONFIG.num_params - norms) // 4 + norms  # matrices over fsdp x tensor, norms everywhere
    assert memory["params"] == 4 * split
    assert memory["optimizer"] == 8 * split + 3 * 4  # two moments, and the step counters
    tokens = 8 * 17 * 4 // 4
    assert memory["arguments"] >= memory["params"] * 2 + memory["optimizer"]  # the teacher too
    assert memory["arguments"] <= memory["params"] * 2 + memory["optimizer"] + tokens + 4096
    assert memory["temporaries"] > 0 and memory["flops"] > 0
