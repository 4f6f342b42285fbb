"""EfficientQAT: gradients of the papers, two streams, early stopping, resume, memory, and what is refused."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError, Stopped
from lowbit.evaluate.size import sizes
from lowbit.formats import base
from lowbit.formats.base import Coded, FormatError, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models import hf
from lowbit.models.decoder import forward
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import calibrate, rtn
from lowbit.qat import block_ap as ap
from lowbit.qat.block_ap import block_ap
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language
from lowbit.train.params import flatten, trainable, unflatten

FMT = base.get("int2:g16:asym:rounded")
ASSIGNMENT = Plan.uniform(FMT.name).resolve(CONFIG.shapes())
OPTIONS = BlockOptions(rows=8, valid_rows=4, batch=4, epochs=3, weight_lr=1e-2, quant_lr=1e-3)
TOKENS = np.concatenate([rows()(s)["tokens"][:, :16] for s in range(3)])
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, params())


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Block-AP that nobody disturbs: parameters, reports, folder."""
    reports, folder = [], tmp_path_factory.mktemp("blocks")
    out = block_ap(model, ASSIGNMENT, TOKENS, OPTIONS, folder, lambda r, n: reports.append(r))
    return out, reports, folder


def arrays(tree) -> dict[str, np.ndarray]:
    return {p: np.asarray(a) for p, a in flatten(tree)[0].items()}


def same(a, b) -> bool:
    a, b = arrays(a), arrays(b)
    return a.keys() == b.keys() and all(a[p].tobytes() == b[p].tobytes() for p in a)


def test_zero_points_learn_from_what_is_clipped_and_leave_as_they_trained():
    """dz is -s of the clipped and 0 of the others; z beyond the codes counts as the nearest code, in the file too."""
    w = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    fit = {"scale": jnp.full((1, 1), 0.5), "zero": jnp.full((1, 1), 1.0)}
    inside = (np.rint(w / 0.5) + 1 >= 0) & (np.rint(w / 0.5) + 1 <= 3)
    value, pull = jax.vjp(lambda p: FMT.fake_quant(jnp.asarray(w), p), fit)
    for i in range(16):
        dz = float(pull(jnp.zeros((1, 16)).at[0, i].set(1.0))[0]["zero"][0, 0])
        assert dz == (0.0 if inside[0, i] else -0.5)
    assert 0 < inside.sum() < 16
    for zero, stored in ((-2.7, 0), (5.2, 3), (1.4, 1)):
        p = fit | {"zero": jnp.full((1, 1), zero)}
        q = FMT.encode(jnp.asarray(w), p)
        assert int(base.unpacked(q)[1]["zero"][0, 0]) == stored
        np.testing.assert_array_equal(q.decode(), FMT.fake_quant(jnp.asarray(w), p))


@pytest.mark.slow
def test_the_outer_scales_of_two_levels_have_the_derivative_of_the_product():
    """`w = d sc (q - z) - dmin mn`: the codes and the inner scales stay, d's gradient is what it multiplies."""
    rng = np.random.default_rng(0)
    w, g = (rng.standard_normal((2, 512)).astype(np.float32) for _ in range(2))
    for name, every, names in (("q2_k", False, {"d"}), ("q2_k", True, {"d", "dmin"}), ("q3_k", False, {"d"})):
        q = base.get(name).encode(jnp.asarray(w))
        coded = Coded.of(q, every)
        assert set(coded.params) == names
        value, pull = jax.vjp(lambda p, coded=coded: dataclasses.replace(coded, params=p).value(), coded.params)
        assert np.asarray(value).tobytes() == np.asarray(q.decode()).tobytes()
        got = pull(jnp.asarray(g))[0]
        stored = {k: np.asarray(a, np.float64) for k, a in base.unpacked(q)[1].items()}
        low = np.repeat(stored.get("mn", np.zeros((2, 32))), 16, 1) * np.repeat(
            stored.get("dmin", np.zeros((2, 2))), 256, 1
        )
        want = ((np.asarray(value, np.float64) + low) / np.repeat(stored["d"], 256, 1) * g).reshape(2, 2, 256).sum(2)
        np.testing.assert_allclose(got["d"], want, rtol=1e-4, atol=1e-4)
        if every:
            want = -(np.repeat(stored["mn"], 16, 1) * g).reshape(2, 2, 256).sum(2)
            np.testing.assert_allclose(got["dmin"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int2:g16:asym", "int4:tensor", "ternary:channel", "q4_1", "int1:g16"])
def test_scales_of_frozen_codes_have_the_gradient_q_minus_z(name):
    fmt = base.get(name)
    rng = np.random.default_rng(0)
    w, g = (rng.standard_normal((4, 32)).astype(np.float32) for _ in range(2))
    q = fmt.encode(jnp.asarray(w))
    coded = Coded.of(q)
    value, pull = jax.vjp(lambda p: dataclasses.replace(coded, params=p).value(), coded.params)
    assert np.asarray(value).tobytes() == np.asarray(q.decode()).tobytes()
    codes, stored = base.unpacked(q)
    zero = np.asarray(stored.get("zero", np.zeros((1, 1))))
    levels = np.asarray(codes, np.float64) - np.repeat(zero, 32 // zero.shape[1], axis=1)
    got = np.asarray(pull(jnp.asarray(g))[0]["scale"])
    each = (levels * g).reshape(4, got.shape[1], -1)
    want = each.sum(axis=2) if got.shape[0] == 4 else each.sum(axis=(0, 2))[None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_codes_survive_any_scale():
    """Codes and zero points bit for bit, the scale as its type holds it."""
    q = FMT.encode(jnp.asarray(np.random.default_rng(1).standard_normal((4, 32)), jnp.float32))
    coded = Coded.of(q)
    scale = np.float32([[1e-12, 0.3], [-1.0, 7.7], [1 / 3, 60000.0], [1.0, 2.0]])
    coded = dataclasses.replace(coded, params={"scale": jnp.asarray(scale)})
    out = coded.encode()
    for name in ("codes", "zero"):
        assert np.asarray(out.arrays[name]).tobytes() == np.asarray(q.arrays[name]).tobytes()
    assert out.arrays["scale"].dtype == jnp.float16 and float(out.arrays["scale"][1, 0]) == 2.0**-24
    np.testing.assert_array_equal(coded.value(), out.decode())
    np.testing.assert_array_equal(jax.jit(lambda c: c.value() * 1.0)(coded), out.decode())
    with pytest.raises(FormatError, match="fp16' has no scales to train"):
        Coded.of(base.get("fp16").encode(jnp.ones((2, 2))))
    with pytest.raises(FormatError, match="scale of magnitude 1e\\+06"):
        dataclasses.replace(coded, params={"scale": jnp.asarray(scale * 1e6 / 60000)}).check_values()


@pytest.mark.slow
def test_end_to_end_learns_scales_alone(model, tmp_path):
    """Through the ordinary loop: a resumed run too, packed logits bit for bit, only scales moved."""
    recipe = qat.get("e2e-qp")
    start = recipe.prepare(model.params, ASSIGNMENT)
    flat, layout = flatten(start)
    learned = {n for n in trainable(layout) if n.endswith(":scale")}
    assert {f"{s}:scale" for s in ASSIGNMENT} == learned and same(unflatten(flat, layout), start)
    assert flat[f"{Q}:codes"].dtype == jnp.uint8 and flat[f"{Q}:codes"].nbytes == 32 * 32 // 4
    assert sizes(start)["stored_bytes"] == sizes(recipe.convert(start))["stored_bytes"]

    config = TrainConfig(**recipe.defaults | {"steps": 4, "batch_size": 4, "lr": 1e-2, "save_every": 2})
    goal = language(CONFIG, config)

    def stop(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows()(step)

    assert train(start, stop, goal, config, directory=tmp_path).status == "stopped"
    done = train(start, rows(), goal, config, directory=tmp_path, resume=True)
    assert done.history[-1]["step"] == 4 and done.history[-1]["loss"] > 0
    moved = {p for p, a in arrays(done.params).items() if a.tobytes() != np.asarray(flat[p]).tobytes()}
    assert moved == learned

    packed = recipe.convert(done.params)
    assert all(isinstance(dict(trees.items(packed))[s], QTensor) for s in ASSIGNMENT)
    tokens = rows()(9)["tokens"]
    run_it = jax.jit(forward, static_argnames="config")
    np.testing.assert_array_equal(run_it(done.params, tokens, CONFIG), run_it(packed, tokens, CONFIG))
    # A packed model's own codes are taken, not new ones.
    again = recipe.prepare(packed, ASSIGNMENT)
    assert isinstance(dict(trees.items(again))[Q], Coded) and same(recipe.convert(again), packed)


def test_block_ap_lowers_the_error_and_packs_what_it_trained(model, whole):
    out, reports, _ = whole
    assert [r["block"] for r in reports] == [0, 1] and all(
        r["weights"] == 4 * 32 * 32 - 2 * 16 * 32 + 3 * 32 * 48 for r in reports
    )
    for r in reports:
        assert r["valid_mse"] < r["start_mse"] and r["best_epoch"] > 0 and r["seconds"] > 0
        assert r["seconds_per_million_weights"] == pytest.approx(r["seconds"] / r["weights"] * 1e6, rel=0.1, abs=1)
    assert all(isinstance(dict(trees.items(out))[s], QTensor) for s in ASSIGNMENT)
    rounded = rtn.quantize(model.params, ASSIGNMENT)
    assert [p for p, _ in trees.items(out)] == [p for p, _ in trees.items(model.params)]
    changed = {p.partition(":")[0] for p, a in arrays(out).items() if a.tobytes() != arrays(rounded)[p].tobytes()}
    assert changed == set(ASSIGNMENT)  # no norm, no embedding

    # The error that was reported is that of the packed blocks, on the rows that validate.
    streams = {
        "float": (model.params, calibrate.Stream(CONFIG, TOKENS)),
        "packed": (out, calibrate.Stream(CONFIG, TOKENS)),
    }
    for tree, stream in streams.values():
        stream.start(model.params["model"]["embed_tokens"])
        for i in range(2):
            stream.advance(calibrate.working(tree["model"]["layers"][str(i)]), i)
    a, b = (s.take(range(8, 12)) for _, s in streams.values())
    assert np.mean(np.square(a - b)) == pytest.approx(reports[1]["valid_mse"], rel=1e-5)


def test_streams_differ_and_labels_are_the_float_ones(model, monkeypatch):
    """Block 0 gets the same from both; block 1 gets, as a student, what block 0 gives packed."""
    seen = []

    def spy(config, student, stream, labels, index, *rest):
        seen.append((stream.take(range(12)), labels.take(range(12))))
        return real(config, student, stream, labels, index, *rest)

    real = ap.train_block
    monkeypatch.setattr(ap, "train_block", spy)
    out = block_ap(model, ASSIGNMENT, TOKENS, OPTIONS)
    stream = calibrate.Stream(CONFIG, TOKENS)
    stream.start(model.params["model"]["embed_tokens"])
    for i in range(2):
        before = stream.take(range(12))
        stream.advance(calibrate.working(model.params["model"]["layers"][str(i)]), i)
        np.testing.assert_array_equal(seen[i][1], stream.take(range(12)))
        assert np.array_equal(seen[i][0], before) == (i == 0)
    student = calibrate.Stream(CONFIG, TOKENS)
    student.start(model.params["model"]["embed_tokens"])
    student.advance(calibrate.working(out["model"]["layers"]["0"]), 0)
    np.testing.assert_array_equal(seen[1][0], student.take(range(12)))


def test_early_stopping_returns_the_best(model, monkeypatch):
    """Whatever later epochs do: validation errors are made up, weights are those of the lowest."""
    student = qat.get("ste-learned").prepare(model.params, ASSIGNMENT)["model"]["layers"]["0"]
    stream, labels = calibrate.Stream(CONFIG, TOKENS), calibrate.Stream(CONFIG, TOKENS)
    for s in (stream, labels):
        s.start(model.params["model"]["embed_tokens"])
    labels.advance(calibrate.working(model.params["model"]["layers"]["0"]), 0)

    def run(errors, **options):
        made_up, seen = iter(errors), []

        def mse(config, latents, *rest):
            seen.append({p: np.asarray(a.w) for p, a in latents.items()})
            return next(made_up)

        monkeypatch.setattr(ap, "_mse", mse)
        return ap.train_block(CONFIG, student, stream, labels, 0, dataclasses.replace(OPTIONS, **options)), seen

    for errors, best, options in (
        ([5.0, 3.0, 4.0], 1, {}),  # patience 1: epoch 3 never runs
        ([5.0, 3.0, 4.0, 2.0], 3, {"patience": 2}),
        ([5.0, 6.0], 0, {}),
    ):
        got, seen = run(errors, **options)
        assert got.best == best and got.start == 5.0 and got.valid == errors[1:] and len(seen) == len(errors)
        assert all(np.array_equal(got.latents[p].w, w) for p, w in seen[best].items())
        others = [s for i, s in enumerate(seen) if i != best]
        assert not any(np.array_equal(s["mlp.up_proj"], seen[best]["mlp.up_proj"]) for s in others)


def test_a_resumed_run_has_the_same_bits(model, whole, tmp_path, monkeypatch):
    """Stopped inside of block 1; then with a block of another run in the way; then everything is there already."""
    out, reports, _ = whole
    count, steps = [], [2 * r["epochs"] for r in reports]
    real = ap._step

    def step(*args):
        count.append(1)
        if len(count) == steps[0] + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(ap, "_step", step)
    with pytest.raises(Stopped, match="stopped in block 2 of 2: those before are saved in .*, continue with --resume"):
        block_ap(model, ASSIGNMENT, TOKENS, OPTIONS, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["00000"]
    count += [1] * 100
    before, again = len(count), []
    resumed = block_ap(model, ASSIGNMENT, TOKENS, OPTIONS, tmp_path, lambda r, n: again.append(r))
    assert len(count) == before + steps[1] and same(resumed, out)  # block 0 was not trained again
    assert [r["valid_mse"] for r in again] == [r["valid_mse"] for r in reports]
    before = len(count)
    assert same(block_ap(model, ASSIGNMENT, TOKENS, OPTIONS, tmp_path), out) and len(count) == before
    shutil.rmtree(tmp_path / "00000")  # block 1 is there, and its inputs are not needed
    assert same(block_ap(model, ASSIGNMENT, TOKENS, OPTIONS, tmp_path), out) and len(count) == before + steps[0]
    fresh = block_ap(model, ASSIGNMENT, TOKENS, dataclasses.replace(OPTIONS, seed=1), tmp_path)
    assert len(count) >= before + steps[0] + 4 and not same(fresh, out)


@pytest.mark.slow
def test_killed_in_a_block_and_resumed(whole, tmp_path):
    """A real process, killed with SIGKILL between the blocks and inside of one."""
    script = (
        "import os, sys, signal, numpy as np\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "import test_efficientqat as t\n"
        "from lowbit.qat import block_ap as ap\n"
        "real, n, at = ap._step, [0], int(sys.argv[4])\n"
        "def step(*a):\n"
        "    n[0] += 1\n"
        "    if n[0] == at: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a)\n"
        "ap._step = step\n"
        "out = ap.block_ap(t.Model(t.CONFIG, t.params()), t.ASSIGNMENT, t.TOKENS, t.OPTIONS, sys.argv[3])\n"
        "np.savez(sys.argv[3] + '/out.npz', **t.arrays(out))\n"
    )
    here = Path(__file__).parent
    folder = tmp_path / "b"

    def start(at: int) -> int:
        command = [sys.executable, "-c", script, str(here), str(here.parent / "train"), str(folder), str(at)]
        return subprocess.run(command, capture_output=True, timeout=300).returncode

    assert start(2 * whole[1][0]["epochs"] + 2) == -signal.SIGKILL and [p.name for p in folder.iterdir()] == ["00000"]
    assert start(10**6) == 0
    with np.load(folder / "out.npz") as found:
        want = arrays(whole[0])
        assert sorted(found.files) == sorted(want) and all(found[p].tobytes() == want[p].tobytes() for p in want)


def test_one_block_in_memory_and_one_program_for_all(model, tmp_path, monkeypatch):
    """While a block learns, no other block's float32 weights or moments exist; equal blocks share a program. Of a model
    in a folder one block is read at a time."""
    ap._step.clear_cache()
    existing = []

    def step(config, latents, state, *rest):
        shapes = [a.shape for a in jax.live_arrays()]
        existing.append(sum(s == (48, 32) for s in shapes))
        return real(config, latents, state, *rest)

    real = ap._step
    monkeypatch.setattr(ap, "_step", step)
    options = dataclasses.replace(OPTIONS, epochs=1)
    out = block_ap(model, ASSIGNMENT, TOKENS, options)
    # Of [48, 32] there are gate and up, of the model and of the block: the same at each step of each block.
    assert len(existing) == 4 and len(set(existing)) == 1
    assert real._cache_size() == 1

    save_hf(model, tmp_path / "model", dtype=None)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.params)
    first = existing[0]
    existing.clear()
    lazy = block_ap(model.replace(params=abstract), ASSIGNMENT, TOKENS, options, read=hf.readers(tmp_path / "model"))
    assert same(lazy, out)
    # `model` is still there, and what was read of one block: its gate and up.
    assert set(existing) == {first + 2}


def test_memory_is_told_beforehand(model):
    layer = {"model": {"layers": {"0": model.params["model"]["layers"]["0"]}}}
    sites = {s: f for s, f in ASSIGNMENT.items() if ".0." in s}
    got = ap.step_memory(CONFIG, layer, sites, OPTIONS, 16)
    weights = sum(a.size for p, a in trees.items(layer) if p in sites)
    groups = 2 * weights // 16  # scales and zero points
    assert got["params"] == 4 * (weights + groups + 2 * 32)
    assert got["optimizer"] == 2 * 4 * (weights + groups) + 4
    assert got["streams"] == 2 * 4 * 12 * 16 * 32
    assert got["params"] + got["optimizer"] < got["arguments"] < got["params"] + got["optimizer"] + 4 * 4 * 16 * 32 * 3
    assert got["temporaries"] > 0


@pytest.mark.slow
def test_activation_cache_and_kept_weights(model):
    """A plan with inputs, a cache, an embedding and a linear that stays; the recipe goes on with what Block-AP gave."""
    plan = Plan(
        (
            Rule(r"model\.embed_tokens", "int8:channel"),
            Rule(r".*\.down_proj", "bf16"),
            Rule(r".*\.layers\.1\.mlp\..*:in", "int8:token"),
            Rule(r".*k_cache", "int8:token"),
        ),
        FMT.name,
    )
    assignment = plan.resolve(CONFIG.shapes())
    options = dataclasses.replace(OPTIONS, epochs=1)
    out = block_ap(model, assignment, TOKENS, options)
    leaves = dict(trees.items(out))
    assert isinstance(leaves["model.embed_tokens"], QTensor)
    assert np.array_equal(
        leaves["model.layers.0.mlp.down_proj"], model.params["model"]["layers"]["0"]["mlp"]["down_proj"]
    )
    up = leaves["model.layers.1.mlp.up_proj"]
    assert isinstance(up, PreparedInput) and up.act.name == "int8:token" and isinstance(up.w, QTensor)
    assert leaves["model.layers.0.self_attn.k_cache"].format.name == "int8:token"
    recipe = qat.get("efficientqat")
    ready = recipe.prepare(out, assignment)
    assert isinstance(dict(trees.items(ready))["model.layers.1.mlp.up_proj"].w, Coded)
    assert same(recipe.convert(ready), out)


def test_refusals(model, whole, tmp_path):
    for name, value in (
        ("rows", 0),
        ("valid_rows", 0),
        ("valid_rows", 3),
        ("batch", 0),
        ("epochs", 0),
        ("patience", 0),
    ):
        with pytest.raises(InputError, match=f"blocks {name} is {value} "):
            BlockOptions(**{name: value})
    for options, text in (
        ({"weight_lr": -1.0}, "blocks weight_lr is -1.0"),
        ({"quant_lr": float("nan")}, "blocks quant_lr is nan"),
        ({"lr_end": 2.0}, "blocks lr_end is 2.0"),
        ({"weight_lr": 0.0, "quant_lr": 0.0}, "weight_lr and quant_lr are 0"),
    ):
        with pytest.raises(InputError, match=text):
            BlockOptions(**options)
    with pytest.raises(InputError, match=r"Block-AP has 12 rows of tokens \(needed: 10 to train and 4 to validate\)"):
        block_ap(model, ASSIGNMENT, TOKENS, BlockOptions(rows=10, valid_rows=4))
    huge = trees.map_leaves(lambda p, a: a * 1e25 if p.endswith("o_proj") else a, model.params)
    with pytest.raises(InputError, match="mean squared error inf before training of block 0 .*smaller rates"):
        block_ap(model.replace(params=huge), ASSIGNMENT, TOKENS, OPTIONS, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match="q_proj is a QTensor already"):
        block_ap(model.replace(params=whole[0]), ASSIGNMENT, TOKENS, OPTIONS)
    with pytest.raises(InputError, match="no parameter 'model.layers.0.nothing'"):
        block_ap(model, {"model.layers.0.nothing": FMT}, TOKENS, OPTIONS)
    recipe = qat.get("e2e-qp")
    with pytest.raises(InputError, match="q_proj is quantized already"):
        recipe.prepare(whole[0], {Q: base.get("int4:g16")})
    with pytest.raises(InputError, match="q_proj: format 'fp16' has no scales"):
        recipe.prepare(model.params, {Q: base.get("fp16")})
    with pytest.raises(InputError, match="nothing"):
        recipe.prepare(model.params, {"nothing": FMT})


FIRST = {n.split(":")[0]: n for n in reversed(base.names()) if n not in ("bf16", "fp16", "f32")}  # of each family


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST.values())
def test_every_family_with_scales_keeps_its_codes(name):
    fmt = base.get(name)
    q = fmt.encode(jnp.asarray(np.random.default_rng(0).standard_normal((32, 256)), jnp.float32))
    if name.startswith("mxfp4") or name.endswith(":dq"):  # their scales are codes
        with pytest.raises(InputError, match=f"format '{name}' has no scales to train"):
            Coded.of(q)
        return

    @jax.jit
    def both(c, other):
        return c.encode(), c.value(), dataclasses.replace(c, params=other).encode()

    coded = Coded.of(q, every=not {"scale", "d"} & set(q.arrays))  # codebooks alone have none
    packed, value, moved = both(coded, {k: a * 1.5 for k, a in coded.params.items()})
    np.testing.assert_array_equal(value, q.decode())
    assert all(np.asarray(packed.arrays[k]).tobytes() == np.asarray(a).tobytes() for k, a in q.arrays.items())
    assert all(np.asarray(moved.arrays[k]).tobytes() == np.asarray(a).tobytes() for k, a in coded.arrays.items())
    coded.check_values()
