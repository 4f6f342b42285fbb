"""LLM-QAT's grids, gradient and defaults, and the options that give activations and caches a format in training."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.formats.kv import get_kv
from lowbit.models.decoder import forward
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from tests.models.tiny import params_of

W4A8KV4 = Plan((Rule(r".*layers.*:in", "int8:token"), Rule(r".*_cache", "int4:token")), "int4")
RECIPE = qat.get("llm-qat")


def published(w, bits):
    """`SymQuantizer` in float64."""
    s = (2 ** (bits - 1) - 1) / (np.abs(w).max(-1, keepdims=True) + 1e-6)
    codes = np.round(w * s)
    return codes, codes / (s + 1e-6)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_lie_on_the_published_grid_and_no_level_is_lost(bits):
    w = np.random.default_rng(bits).standard_normal((16, 64)).astype(np.float32)
    w[3] = 0.0
    w[5, 7] = -9.0
    fmt = dataclasses.replace(formats.get(f"int{bits}:channel:minmax:fixed2"), storage="f32")
    codes, values = published(w.astype(np.float64), bits)
    q = jax.jit(fmt.encode)(jnp.asarray(w))
    np.testing.assert_array_equal(fmt.affine(q).codes, codes)
    np.testing.assert_allclose(q.decode(), values, rtol=1e-4, atol=0)
    got = np.asarray(fmt.affine(jax.jit(dataclasses.replace(fmt, storage="fp16").encode)(jnp.asarray(w))).codes)
    top = 2 ** (bits - 1) - 1
    assert np.abs(got).max() == top and (np.delete(np.abs(got).max(-1), 3) == top).all() and not got[3].any()


def test_prepare_gives_the_grid_and_the_gradient_of_the_paper():
    latent = dict(trees.items(RECIPE.prepare(params(), W4A8KV4.resolve(CONFIG.shapes()))))
    up = latent["model.layers.0.mlp.up_proj"]
    assert (up.w.format.name, up.act.name) == ("int4:channel:minmax:fixed2", "int8:token:fixed2")
    assert latent["model.layers.1.self_attn.k_cache"].format.name == "int4:token"
    keep = Plan((Rule(r".*:in", "int8:token:clip"),), "int4:g16:minmax:clip").resolve(CONFIG.shapes())
    up = dict(trees.items(RECIPE.prepare(params(), keep)))["model.layers.0.mlp.up_proj"]
    assert (up.w.format.name, up.act.name) == ("int4:g16:minmax:clip", "int8:token:clip")  # what was asked for

    x = jnp.asarray([[0.5, -1.99, 2.0, -2.0, 7.0, 1.0, 0.0, -3.0]])
    g = jnp.arange(1.0, 9.0)[None]
    inner = [True, True, False, False, False, True, True, False]
    through = jax.jit(lambda f, x: jax.vjp(f, x)[1](g)[0], static_argnums=0)
    for f in (
        formats.get("int4:channel:minmax:fixed2").fake_quant,
        latent["model.layers.0.mlp.up_proj"].act.fake_quant,
    ):
        np.testing.assert_array_equal(through(f, x), jnp.where(jnp.asarray(inner), g, 0.0))
    kv = partial(get_kv("int4:token").fake_quant)
    np.testing.assert_array_equal(through(lambda x: kv(x[None, :, None])[0, :, 0], x), g)


def test_the_cache_is_rounded_in_training_and_what_is_packed_gives_the_same_logits():
    tokens = jnp.asarray(rows()(0)["tokens"])
    logits = jax.jit(lambda p: forward(p, tokens, CONFIG))
    latent = RECIPE.prepare(params(1), W4A8KV4.resolve(CONFIG.shapes()))
    a, b = np.asarray(logits(latent)), np.asarray(logits(RECIPE.convert(latent)))
    np.testing.assert_array_equal(a, b)
    exact = RECIPE.prepare(params(1), Plan(W4A8KV4.rules[:1], "int4").resolve(CONFIG.shapes()))
    assert np.abs(a - np.asarray(logits(exact))).max() > 1e-3
    grads = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(forward(p, tokens, CONFIG)))))(latent)
    for name in ("k_proj", "v_proj"):  # through the rounded keys and values
        assert float(jnp.mean(grads["model"]["layers"]["0"]["self_attn"][name].w.w != 0)) > 0.5


@pytest.mark.parametrize(
    "fmt, message",
    [
        ("int2", "has no grid for 2 bits .allowed: int3 to int8; for 2 bits recipe paretoq"),
        ("int1", "has no grid for 1 bits"),
        ("int4:asym", "allowed: symmetric int3 to int8"),
        ("ternary:tensor", "allowed: symmetric int3 to int8"),
        ("int4:mse", "whose scale is minmax .allowed: without mse, or recipe ste"),
    ],
)
def test_other_grids_are_refused_by_name(fmt, message):
    with pytest.raises(InputError, match=f"q_proj: format {formats.get(fmt).name} with recipe llm-qat.*{message}"):
        RECIPE.prepare(params(), Plan.uniform(fmt).resolve(CONFIG.shapes()))


@pytest.fixture
def here(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, vocab_size=258, num_layers=1)
    save_hf(Model(config, params_of(config), ByteTokenizer()), tmp_path / "m", dtype="float32")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    (tmp_path / "in.toml").write_text('[[rule]]\nmatch = ".*up_proj:in"\nformat = "int8:token"\n')
    (tmp_path / "kv.toml").write_text('[[rule]]\nmatch = ".*v_cache"\nformat = "int8:token"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "train m --text text.txt --recipe llm-qat --format int4 --batch-size 2 --seq 16 --steps 2 --out r".split()


@pytest.mark.slow
def test_what_was_trained_is_what_is_saved_and_evaluated(here, capsys):
    argv = [*TRAIN, *"--act int8:token --kv int4:token --v-cache int8:token:asym --eval-text text.txt --json".split()]
    assert main(argv) == 0
    trained = json.loads(capsys.readouterr().out)
    settings = json.loads((here / "r/config.json").read_text())
    assert settings["train"]["lr"] == 2e-5 and settings["train"]["loss"] == "kl" and settings["train"]["lr_end"] == 0
    assert main("inspect r --json".split()) == 0
    saved = {t["path"]: t["format"] for t in json.loads(capsys.readouterr().out)["tensors"]}
    assert saved["model.layers.0.self_attn.k_cache"] == "int4:token"
    assert saved["model.layers.0.self_attn.v_cache"] == "int8:token:asym"
    assert saved["model.layers.0.mlp.up_proj"].startswith("int4:channel:minmax:fixed2")
    assert main("eval r --text text.txt --convention gptq-16 --json".split()) == 0
    scored = json.loads(capsys.readouterr().out)["nats_per_token"]
    assert scored == pytest.approx(trained["best_held_out_loss"], rel=1e-6)
    assert main("eval r --text text.txt --convention gptq-16 --act int8:token".split()) == 2
    assert "quantizes its input already, to int8:token:fixed2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rules in.toml --act int8:token", "--act int8:token with a rule for activations, '.*up_proj:in'"),
        ("--rules kv.toml --kv int4:token", "--kv int4:token with a rule for caches, '.*v_cache'"),
        ("--rules kv.toml --k-cache int4:token", "--kv int4:token with a rule for caches"),
        ("--act int9:token", "unknown activation format 'int9:token'"),
        ("--kv int4:tokens", "unknown cache format 'int4:tokens'"),
        ("--kv int4:token:g16", "k_cache: cache format int4:token:g16: heads of 8 values"),
        ("--kv int4:token:g16 --dry-run", "k_cache: cache format int4:token:g16: heads of 8 values"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(here, capsys, options, message):
    assert main([*TRAIN, *options.split()]) == 2
    assert message in capsys.readouterr().err and not (here / "r").exists()
