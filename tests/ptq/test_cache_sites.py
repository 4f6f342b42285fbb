"""Cache formats of a plan, and those that a folder has, come through every solver."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.linalg import online
from lowbit.models import cache as caches
from lowbit.models.cache import with_caches
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import init_params
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import base

CONFIG = ModelConfig("llama", 258, 32, 48, 2, 4, 2, 8, 64, tied=True)
PLAN = Plan((Rule(r".*\.1\..*\.k_cache", "int4:g4:asym"), Rule(r".*\.v_cache", "int8")), "int4:g16")
TEXT = ["The quick brown fox jumps over the lazy dog. " * 40]
OPTIONS = {"rtn": {}, "gptq": {"rows": 4, "length": 32}}
WANT = {
    "model.layers.0.self_attn.k_cache": "int3:channel:g4",
    "model.layers.0.self_attn.v_cache": "int8:token + kronecker:1x8",
    "model.layers.1.self_attn.k_cache": "int4:token:g4:asym",
    "model.layers.1.self_attn.v_cache": "int8:token",
}


def source() -> Model:
    """With a format and a transform that stay, and formats that the plan replaces."""
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ByteTokenizer())
    model = with_caches(model, "int3:channel:g4")
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    attn = model.params["model"]["layers"]["0"]["self_attn"]
    attn["v_cache"] = caches.CacheSite(None, online.Kronecker(jnp.ones((1, 1)), jnp.asarray(q, jnp.float32)))
    return model


@pytest.mark.parametrize("solver", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_caches_come_through(solver, tmp_path):
    model, s = source(), base.get(solver)
    save_hf(model, tmp_path / "src", dtype=None, packed=True)
    documents = TEXT if s.calibrates else None
    params = s.quantize(model, PLAN.resolve(CONFIG.shapes()), documents, **OPTIONS[solver])
    s.quantize_dir(tmp_path / "src", PLAN, tmp_path / "out", None, documents, **OPTIONS[solver])
    again = load_hf(tmp_path / "out")
    for tree in (params, again.params):
        assert {path: site.name for path, site in caches.sites(tree).items()} == WANT
    tokens = np.arange(20)[None]
    np.testing.assert_allclose(again.logits(tokens), model.replace(params=params).logits(tokens), atol=1e-5)
    bad = dataclasses.replace(PLAN, rules=(Rule(r".*\.k_cache", "int4:g16"),))
    with pytest.raises(InputError, match="int4:token:g16: heads of 8 values"):
        s.quantize_dir(tmp_path / "src", bad, tmp_path / "bad", None, documents, **OPTIONS[solver])


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_an_interrupted_run_keeps_them(solver, tmp_path):
    save_hf(source(), tmp_path / "src", dtype=None, packed=True)
    s = base.get(solver)
    documents = TEXT if s.calibrates else None

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.quantize_dir(tmp_path / "src", PLAN, tmp_path / "out", stop, documents, **OPTIONS[solver])
    s.quantize_dir(tmp_path / "src", PLAN, tmp_path / "out", None, documents, **OPTIONS[solver])
    assert {path: site.name for path, site in caches.sites(load_hf(tmp_path / "out").params).items()} == WANT
