import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowbit import tree as trees
from lowbit.formats.base import QTensor
from lowbit.models.decoder import forward
from lowbit.models.nnx import from_nnx, to_nnx
from tests.models.tiny import quantized, tiny

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


def test_gradients_are_those_of_the_function():
    model = tiny("llama-biases")
    grads = nnx.grad(lambda m: loss(m(TOKENS)))(to_nnx(model))
    want = jax.grad(lambda p: loss(forward(p, TOKENS, model.config)))(model.params)
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
