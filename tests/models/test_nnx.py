import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.base import QTensor
from lowbit.models.nnx import assign, dequantize, fake_quantize, from_nnx, quantize, to_nnx
from lowbit.plan import Plan, Rule
from tests.models.tiny import forward, quantized, tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)
PACKED = {"model.layers.1.mlp.up_proj": "int4:g16"}


@pytest.mark.parametrize("make", [lambda: tiny("qwen2"), lambda: quantized(tiny(), PACKED)])
def test_round_trip_and_jit(make):
    model = make()
    module = to_nnx(model)
    back = from_nnx(module, model)
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    assert [p for p, _ in trees.items(back.params)] == [p for p, _ in trees.items(model.params)]
    got = nnx.jit(lambda m, x: m(x))(module, TOKENS)
    np.testing.assert_allclose(got, model.logits(TOKENS), atol=1e-5)


def test_state_is_the_tree():
    _, state = nnx.split(to_nnx(quantized(tiny(), PACKED)))
    flat = dict(state["flat"].items())
    assert isinstance(flat["model.layers.1.mlp.up_proj"].get_value(), QTensor)
    assert set(flat) == set(tiny().config.shapes())


def loss(logits):
    return -jax.nn.log_softmax(logits[:, :-1])[..., 3].mean()


@pytest.mark.slow
def test_gradients_are_those_of_the_function():
    model = tiny("llama-biases")
    grads = nnx.jit(nnx.grad(lambda m: loss(m(TOKENS))))(to_nnx(model))
    want = jax.jit(jax.grad(lambda p: loss(forward(p, TOKENS, model.config))))(model.params)
    for path, leaf in trees.items(want):
        np.testing.assert_allclose(grads["flat"][path].get_value(), leaf, atol=1e-6)


def test_optimizer_step_reaches_latent_weights():
    model = quantized(tiny(), PACKED, latent=True)
    module = to_nnx(model)
    optimizer = nnx.Optimizer(module, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, grads = nnx.value_and_grad(lambda m: loss(m(TOKENS)))(module)
        optimizer.update(module, grads)
        return value

    first = step(module, optimizer)
    assert step(module, optimizer) < first
    before = trees.get(model.params, "model.layers.1.mlp.up_proj")
    after = trees.get(from_nnx(module).params, "model.layers.1.mlp.up_proj")
    assert not np.array_equal(before.w, after.w) and not np.array_equal(before.params["scale"], after.params["scale"])


# -- any NNX model ----------------------------------------------------------------------------------------------------


class Classifier(nnx.Module):
    """Nothing of ours: flax's own layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(12, 32, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)])
        self.out = nnx.Linear(16, 12, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.out(x)


def classifier():
    return nnx.split(Classifier(nnx.Rngs(0)), nnx.Param, ...)


def test_plan_of_any_model_finds_kernels_input_first():
    _, params, _ = classifier()
    assert {p: f.name for p, f in assign(params, Plan.uniform("int4:g16")).items()} == {
        "layers.0.kernel": "int4:g16",
        "layers.1.kernel": "int4:g16",
    }
    plan = Plan((Rule(r"embed\..*", "int8:channel"), Rule(r"out\.kernel", "q4_0")))
    with pytest.raises(InputError, match=r"q4_0.*cannot hold out\.kernel \[12, 16\]"):
        assign(params, plan)
    with pytest.raises(InputError, match="matches nothing"):
        assign(params, Plan((Rule("nowhere", "int8"),)))
    with pytest.raises(InputError, match="activation format"):
        assign(params, Plan((Rule("out.kernel:in", "int8"),)))
    with pytest.raises(InputError, match="no parameter 'gone'"):
        fake_quantize(params, {"gone": base.get("int8")})


def test_any_model_trains_on_the_grid_that_it_is_packed_to():
    graph, params, rest = classifier()
    plan = Plan((Rule(r"embed\.embedding", "int8:channel"), Rule(r"layers\..*kernel", "int2:g16")))
    assignment = assign(params, plan)
    tokens = jnp.arange(12)

    @jax.jit
    def step(params):
        def nats(params):
            logits = nnx.merge(graph, fake_quantize(params, assignment), rest)(tokens)
            return -jnp.mean(jax.nn.log_softmax(logits)[tokens, (tokens * 5) % 12])

        value, grads = jax.value_and_grad(nats)(params)
        return jax.tree.map(lambda w, g: w - 0.5 * g, params, grads), value

    losses = []
    for _ in range(150):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]

    packed = quantize(params, assignment)
    assert {p: q.shape for p, q in packed.items()} == {
        "embed.embedding": (12, 32),
        "layers.0.kernel": (32, 32),
        "layers.1.kernel": (16, 32),
    }
    on_grid, decoded = jax.jit(lambda s: fake_quantize(s, assignment))(params), dequantize(params, packed)
    jax.tree.map(np.testing.assert_array_equal, on_grid, decoded)
    kernel = decoded["layers"][1]["kernel"].get_value()
    assert len(np.unique(np.asarray(kernel)[:16, 0])) <= 4 and kernel.shape == (32, 16)
    with pytest.raises(InputError, match=r"layers\.0\.kernel"):
        bad = jax.tree.map(lambda w: w * jnp.nan, params)
        quantize(bad, {"layers.0.kernel": assignment["layers.0.kernel"]})
