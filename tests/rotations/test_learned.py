"""SmoothQuant's scales, SpinQuant's rotations, FlatQuant's matrices: equations, orthogonality, and that they help."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.linalg.online import Kronecker
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.rotations import base, flatquant, smoothquant, spinquant
from lowbit.rotations.fold import State, apply
from tests.models.tiny import CONFIGS, params_of

TEXT = ["".join(chr(97 + (i * i + 3 * i) % 23) for i in range(4000))]
PLAN = Plan((Rule(r"model\.layers\..*:in", "int4:token"),), "int4")


def small(name: str = "llama", layers: int = 1, **changes) -> Model:
    sliding = CONFIGS[name].sliding_layers[:layers]
    config = dataclasses.replace(CONFIGS[name], vocab_size=260, num_layers=layers, sliding_layers=sliding, **changes)
    return Model(config, params_of(config), ByteTokenizer())


def with_outliers(model: Model) -> Model:
    """The same function, with large channels at the inputs of `q, k, v`, `gate, up` and `down_proj`."""
    s = np.ones(model.config.hidden_size)
    s[3], wide = 1 / 40, np.ones(model.config.intermediate_size)
    wide[5] = 1 / 40
    smooth = {}
    for i in range(model.config.num_layers):
        p = f"model.layers.{i}."
        smooth |= {p + "input_layernorm": s, p + "post_attention_layernorm": s, p + "mlp.down_proj": wide}
    return apply(model, State("outliers", smooth=smooth))


def error(model: Model, fp: Model) -> float:
    """Of the logits when the model's linears are quantized to W4A4."""
    tokens = np.frombuffer(TEXT[0][:256].encode(), np.uint8).reshape(8, 32).astype(np.int32)
    params = rtn.quantize(model.params, PLAN.resolve(model.config.shapes()))
    return float(jnp.mean(jnp.square(model.replace(params=params).logits(tokens) - fp.logits(tokens))))


def test_smoothquant_scales_are_the_papers():
    model = small()
    rng = np.random.default_rng(0)
    absmax = {p: rng.uniform(0.1, 30, s[1]).astype(np.float32) for p, s in model.config.shapes().items() if len(s) == 2}
    absmax = {p: absmax[p.replace("k_proj", "q_proj").replace("v_proj", "q_proj")] for p in absmax}
    got = smoothquant.scales(model, absmax, 0.7, everywhere=False)
    attention = model.params["model"]["layers"]["0"]["self_attn"]
    w = np.max([np.abs(np.asarray(attention[n])).max(0) for n in ("q_proj", "k_proj", "v_proj")], axis=0)
    want = absmax["model.layers.0.self_attn.q_proj"].astype(np.float64) ** 0.7 / w.astype(np.float64) ** 0.3
    np.testing.assert_allclose(got["model.layers.0.input_layernorm"], want, rtol=1e-6)
    assert set(got) == {"model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"}
    everywhere = smoothquant.scales(model, absmax, 0.7, everywhere=True)
    o = everywhere["model.layers.0.self_attn.o_proj"].reshape(2, 2, 8)  # 4 heads, 2 key-value heads
    assert (o[:, 0] == o[:, 1]).all()


@pytest.mark.slow
def test_every_transform_helps_a_model_with_outliers():
    fp = with_outliers(small())
    plain = error(fp, fp)
    assignment = PLAN.resolve(fp.config.shapes())
    for name in ("smoothquant:all:n32", "quarot", "spinquant:steps20:b4:len64", "flatquant:steps30:n16:len64"):
        assert error(base.transform(fp, name, TEXT, assignment), fp) < 0.7 * plain, name


def test_learned_rotations_stay_orthogonal_and_lower_the_loss():
    """100 steps; what is folded is orthogonal to the last bit, what was learned within 1e-5."""
    model = with_outliers(small("llama", 2))
    losses = []
    options = spinquant.Options(steps=100, batch=4, length=32, weights=True)
    state = spinquant.fit(
        model,
        TEXT,
        PLAN.resolve(model.config.shapes()),
        options=options,
        on_step=lambda i, n, loss: losses.append(loss),
    )
    assert len(losses) == 100 and np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    start = spinquant.initial(model.config, "", options)[1]
    assert np.abs(state.residual - np.asarray(start["r1"])).max() > 1e-2  # it moved
    for r in (state.residual, *state.heads.values()):
        assert np.abs(r @ r.T - np.eye(len(r))).max() < 1e-12
    assert len(state.heads) == 2


def test_learning_is_the_same_for_the_same_seed_and_refuses_what_cannot_be():
    model = small()
    options = spinquant.Options(steps=2, batch=2, length=16)
    a, b = (spinquant.fit(model, TEXT, options=options).residual for _ in range(2))
    assert (a == b).all()
    with pytest.raises(InputError, match=r"calibration text has \d+ tokens, \d+ rows of 16"):
        spinquant.fit(model, ["short"], options=options)
    with pytest.raises(InputError, match="unknown loss of spinquant 'mse'"):
        spinquant.Options(loss="mse")
    with pytest.raises(InputError, match="progress with weight_lr"):
        spinquant.learn(model, TEXT, options=dataclasses.replace(options, weight_lr=1e-3), progress="p.safetensors")
    with pytest.raises(InputError, match="learns nothing"):
        spinquant.fit(model, TEXT, options=dataclasses.replace(options, parts=("r3",)))
    with pytest.raises(InputError, match="allowed: spinquant:r2"):
        base.transform(small("gemma2"), "spinquant", TEXT)
    with pytest.raises(InputError, match="no norm before its linears"):
        base.transform(small("bit"), "smoothquant", TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("method", [spinquant, flatquant])
def test_an_interrupted_fit_goes_on_to_the_same_bits(method, tmp_path):
    """Stopped behind what it keeps (ten steps; one layer), and started again: other arguments start anew."""
    model = small("llama", 2)
    options = method.Options(steps=14 if method is spinquant else 3, batch=2, length=16)
    options = dataclasses.replace(options, **({} if method is spinquant else {"rows": 4}))
    whole, seen = method.fit(model, TEXT, options=options), []

    def stop(step: int, steps: int, loss: float) -> None:
        seen.append(step)
        if step == (12 if method is spinquant else 4):
            raise KeyboardInterrupt

    path = tmp_path / "p.safetensors"
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TEXT, options=options, on_step=stop, progress=path)
    seen.clear()
    again = method.fit(model, TEXT, options=options, on_step=lambda i, n, v: seen.append(i), progress=path)
    assert seen == ([11, 12, 13, 14] if method is spinquant else [4, 5, 6])
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), parts(whole), parts(again)))
    seen.clear()
    other = model.replace(params=jax.tree.map(lambda a: a, model.params))
    other.params["model"]["layers"]["1"]["mlp"]["up_proj"] *= 1.01
    method.fit(other, TEXT, options=options, on_step=lambda *a: seen.append(a[0]), progress=path)
    assert seen[0] == 1
    seen.clear()
    method.fit(
        model, TEXT, options=dataclasses.replace(options, seed=1), on_step=lambda *a: seen.append(a[0]), progress=path
    )
    assert seen[0] == 1


def parts(state: State) -> list:
    return [state.residual, dict(state.heads), dict(state.smooth), dict(state.inputs)]


@pytest.mark.slow
def test_weights_learned_with_the_rotations_do_better_than_rotations_alone():
    model = with_outliers(small())
    assignment = PLAN.resolve(model.config.shapes())
    base_options = spinquant.Options(steps=60, batch=8, length=32, weights=True)
    error_of = {}
    for rate in (0.0, 3e-3):
        options = dataclasses.replace(base_options, weight_lr=rate)
        state, done = spinquant.learn(model, TEXT, assignment, options=options)
        if not rate:
            again = apply(model, state)
            for (p, x), (_, y) in zip(trees.items(done.params), trees.items(again.params)):
                for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
                    np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-5, err_msg=p)
        error_of[rate] = error(done, model)
    assert error_of[3e-3] < 0.9 * error_of[0.0]


@pytest.mark.slow
def test_flatquant_makes_invertible_products_for_each_group():
    model = small("qwen2", 2)
    losses: list[float] = []
    options = flatquant.Options(steps=20, batch=4, rows=8, length=32)
    assignment = PLAN.resolve(model.config.shapes())
    state = flatquant.fit(model, TEXT, assignment, options=options, on_step=lambda i, n, v: losses.append(v))
    assert len(losses) == 40 and losses[19] < losses[0] and losses[39] < losses[20]
    ops = {p: op for p, op in state.inputs.items() if ".1." in p}
    assert len(ops) == 7 and all(isinstance(op, Kronecker) for op in ops.values())
    q, k = (ops[f"model.layers.1.self_attn.{n}_proj"] for n in "qk")
    assert (q.left == k.left).all() and q.name == "kronecker:8x4"
    assert ops["model.layers.1.self_attn.o_proj"].name == "kronecker:4x8"
    start = flatquant.initial(32)
    assert np.abs(q.left - np.asarray(start.left)).max() > 1e-3
    assert min(np.linalg.svd(m)[1].min() for op in ops.values() for m in (op.left, op.right)) > 1e-2
