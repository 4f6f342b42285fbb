"""Every recipe: what is trained is what is packed, where its scales start, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.models.decoder import forward
from lowbit.plan import Plan, Rule
from lowbit.ptq import calibrate, rtn
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language

W = jnp.asarray(np.random.default_rng(0).standard_t(4, (8, 32)).astype(np.float32))
UP = "model.layers.1.mlp.up_proj"


def plan(format: str, inputs: str | None = None) -> dict:
    return Plan((Rule(r".*layers.*:in", inputs),) if inputs else (), format).resolve(CONFIG.shapes())


def calibrated(assignment: dict) -> dict:
    """Arrays of static activation formats, from two rows of tokens."""
    read = calibrate.readers_of(params(1))
    static = {p.removesuffix(":in"): f for p, f in assignment.items() if getattr(f, "static", False)}
    if not static:
        return {}
    stats = calibrate.statistics(CONFIG, read, rows()(0)["tokens"][:2, :16])
    return {p: f.fit(stats[p].high_I, stats[p].low_I, stats[p].absmean_I) for p, f in static.items()}


CASES = [
    ("lsq", "int4:channel", "int8:lsq"),
    ("lsq+", "int3:g16", "int4:lsq:asym"),
    ("paretoq", "int1:channel", None),
    ("paretoq", "ternary:channel", None),
    ("paretoq", "int2:channel:midrise", None),
    ("paretoq", "int3:channel", None),
    ("dorefa", "dorefa2:tensor", None),
    ("pact", "dorefa4:tensor", "int4:pact:r0.7"),
]
SLOW = {"int3:g16", "ternary:channel", "int3:channel", "dorefa2:tensor", "dorefa4:tensor", "int1:channel"}


@pytest.mark.parametrize(
    "recipe, fmt, inputs", [pytest.param(*c, marks=[pytest.mark.slow] if c[1] in SLOW else []) for c in CASES]
)
def test_two_steps_then_packed_is_what_was_trained(recipe, fmt, inputs):
    """Everything that the recipe learns moves, and the packed forward pass equals the one in training bit for bit."""
    r, assignment = qat.get(recipe), plan(fmt, inputs)
    start = r.prepare(params(1), assignment, stored=calibrated(assignment))
    config = TrainConfig(steps=2, batch_size=4, lr=1e-2, schedule="constant", scale_lr=1.0)
    done = train(start, rows(), language(CONFIG, config), config).params
    before, after = (dict(trees.items(t))[UP] for t in (start, done))
    if inputs:
        assert all((np.asarray(after.params[k]) != np.asarray(before.params[k])).all() for k in before.params)
        before, after = before.w, after.w
    assert np.mean(np.asarray(after.w) != np.asarray(before.w)) > 0.3
    assert all((np.asarray(after.params[k]) != np.asarray(before.params[k])).any() for k in before.params)
    assert (before.params == {}) == (recipe in ("dorefa", "pact"))
    tokens = jnp.asarray(rows()(0)["tokens"])
    logits = jax.jit(lambda p: forward(p, tokens, CONFIG))
    np.testing.assert_array_equal(logits(done), logits(r.convert(done)))


def starts(recipe: str, fmt: str) -> tuple[str, np.ndarray]:
    """The trained format of one matrix and where its scale starts."""
    leaf = qat.get(recipe).prepare({"model": {"layers": {"0": {"q": W}}}}, {"model.layers.0.q": base.get(fmt)})
    leaf = leaf["model"]["layers"]["0"]["q"]
    return leaf.format.name, np.asarray(leaf.params["scale"])


def test_where_scales_start():
    w = np.asarray(W, np.float64)
    top, mean = np.abs(w).max(1, keepdims=True), np.abs(w).mean(1, keepdims=True)
    groups = w.reshape(8, 2, 16)
    mu, sd = groups.mean(2), groups.std(2)
    for recipe, fmt, name, want in (
        ("lsq", "int4:channel", "int4:channel:lsq", 2 * mean / np.sqrt(7)),
        ("lsq", "int3:tensor", "int3:tensor:lsq", 2 * np.abs(w).mean(keepdims=True) / np.sqrt(3)),
        ("lsq", "ternary:channel", "ternary:channel:lsq", 2 * mean),
        ("lsq", "int2:channel:clip", "int2:channel:clip", 2 * mean),
        ("lsq+", "int4:g16", "int4:g16:lsq", np.maximum(np.abs(mu - 3 * sd), np.abs(mu + 3 * sd)) / 8),
        ("paretoq", "int1:channel", "int1:channel:paretoq", mean),
        ("paretoq", "ternary:channel", "ternary:channel:paretoq", top * 2 / 3),
        ("paretoq", "ternary:channel:paretoq-compat", "ternary:channel:paretoq-compat", top * 2 / 3),
        ("paretoq", "int2:channel:midrise", "int2:channel:midrise:paretoq", top / 4),
        ("paretoq", "int3:channel", "int3:channel:paretoq", top / 3),
        ("paretoq", "int4:channel", "int4:channel:paretoq", top / 7),
    ):
        got = starts(recipe, fmt)
        assert got[0] == name
        np.testing.assert_allclose(got[1], want, rtol=1e-5, err_msg=name)
    for recipe, fmt in (("lsq", "int2:g16:signmse"), ("paretoq", "int2:g16:midrise:mse")):
        np.testing.assert_array_equal(starts(recipe, fmt)[1], base.get(fmt).fitted(W)["scale"])  # what was searched


def test_seq_levels_and_thresholds():
    """ParetoQ's table of levels, in alpha = 1: two bits, three levels, and where they change."""
    two, three = base.get("int2:tensor:midrise:f32"), base.get("ternary:tensor:f32")
    x = np.linspace(-1.2, 1.2, 4801, dtype=np.float32)[None]
    for fmt, scale, levels, cuts in (
        (two, 0.25, [-0.75, -0.25, 0.25, 0.75], [-0.5, 0, 0.5]),
        (three, np.float32(2 / 3), np.float32([-2 / 3, 0, 2 / 3]), [-1 / 3, 1 / 3]),
    ):
        y = np.asarray(fmt.fake_quant(jnp.asarray(x), {"scale": jnp.full((1, 1), scale)}))[0]
        np.testing.assert_allclose(np.unique(y), levels, rtol=1e-6)
        np.testing.assert_allclose(x[0][1:][np.diff(y) != 0], cuts, atol=6e-4)
    y = np.asarray(two.fake_quant(jnp.zeros((1, 4)), {"scale": jnp.full((1, 1), 0.25)}))
    assert (y == 0.25).all()  # rne(-1/2) is -0


def test_dorefa_is_the_paper_formula():
    w = np.asarray(W, np.float64)
    for bits, group in ((2, "tensor"), (4, "channel")):
        fmt = base.get(f"dorefa{bits}:{group}:f32")
        value, pull = jax.jit(lambda w, f=fmt: jax.vjp(f.fake_quant, w, f.init(w)))(W)
        n, axis = 2**bits - 1, None if group == "tensor" else 1
        t, top = np.tanh(w), np.abs(w).max(axis, keepdims=True)
        peak = np.abs(t).max(axis, keepdims=True)
        want = top * (2 * np.rint((t / (2 * peak) + 0.5) * n) / n - 1)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        g = np.random.default_rng(1).standard_normal(w.shape)
        np.testing.assert_allclose(
            pull(jnp.asarray(g, jnp.float32))[0], g * top * (1 - t * t) / peak, rtol=1e-4, atol=1e-5
        )


def test_refusals():
    for recipe, fmt, message in (
        ("lsq", "int1:channel", "down_proj: format 'int1:channel' with recipe lsq .*paretoq for int1"),
        ("lsq", "int4:g16:asym", "symmetric levels with a 0; ste-learned"),
        ("lsq+", "int2:channel:midrise", "recipe lsq[+].*paretoq"),
        ("paretoq", "int2:channel", "'int2:channel' with recipe paretoq .allowed: int1, ternary, int2:midrise, int3"),
        ("paretoq", "int8:channel", "'int8:channel' with recipe paretoq"),
        ("paretoq", "int3:channel:midrise", "with recipe paretoq"),
        ("dorefa", "int4:channel", "dorefa2 to dorefa8"),
        ("pact", "dorefa4:tensor", "without inputs in intN:pact .*rule"),
    ):
        with pytest.raises(InputError, match=message):
            qat.get(recipe).prepare(params(), plan(fmt))
    with pytest.raises(InputError, match="q_proj:in: activation format int8:lsq stores its scale.*calibration"):
        qat.get("lsq").prepare(params(), plan("int4:channel", "int8:lsq"))


def test_ranges_give_learned_formats_their_start():
    """What `lowbit train` does: mean magnitudes of the training text."""

    class Bytes:
        bos_id, eos_ids, vocab_size = None, (0,), 64

        def encode(self, text: str, bos: bool | None = None) -> list[int]:
            return [c % 61 for c in text.encode()]

    assignment = plan("int4:channel", "int8:lsq")
    stored = rtn.ranges(CONFIG, calibrate.readers_of(params()), Bytes(), assignment, ["some text " * 40])
    assert stored.keys() == {p for p in assignment if not p.endswith(":in")}
    assert all(float(a["scale"]) > 0 for a in stored.values())
