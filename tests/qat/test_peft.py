"""Adapters: the leaf, the recipes `qlora`, `loftq` and `qa-lora`, merging, and everywhere that a leaf goes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from models import CONFIG, params, rows
from safetensors.numpy import load_file

from lowbit import cli, qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.evaluate.size import folder_sizes, layer_table, sizes
from lowbit.export.api import export
from lowbit.export.peft import base, export_peft
from lowbit.formats import base as formats
from lowbit.formats.activation import get_act
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.kernels.qdot import qdot
from lowbit.kernels.qdot.api import dense
from lowbit.models.decoder import forward
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.llama2c import save_llama2c
from lowbit.models.model import Model
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from lowbit.qat import adapters
from lowbit.qat.loftq import loftq, low_rank
from lowbit.train import checkpoint, objective, sharding
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.params import flatten, trainable, unflatten

SETTINGS = TrainConfig(steps=2, batch_size=4, loss="kl", lr=3e-3, schedule="constant", clip=0.0)
TOKENS = jnp.asarray(rows()(0)["tokens"][:, :16])
run = jax.jit(lambda p: forward(p, TOKENS, CONFIG))
Q_PROJ = "model.layers.0.self_attn.q_proj"


def assigned(fmt: str):
    """Four weights, of 32 columns: enough of each program to compile."""
    return Plan((Rule(r".*\.(q|up)_proj", fmt),)).resolve(CONFIG.shapes())


@functools.cache
def prepared(recipe: str, fmt: str):
    return qat.get(recipe).prepare(params(), assigned(fmt))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of QLoRA, and where its checkpoint is."""
    goal, place = objective.language(CONFIG, SETTINGS, CONFIG), tmp_path_factory.mktemp("checkpoints")
    done = train(prepared("qlora:r4", "nf2:g16"), rows(), goal, SETTINGS, teacher=params(), directory=place)
    return done.params, place


def noisy(tree, seed=0):
    """The tree with every B drawn anew, as if it had been trained."""
    rng = np.random.default_rng(seed)

    def one(_, leaf):
        if not isinstance(leaf, Adapter):
            return leaf
        return dataclasses.replace(leaf, b=jnp.asarray(0.05 * rng.standard_normal(leaf.b.shape), jnp.float32))

    return trees.map_leaves(one, tree)


def kl(tree) -> float:
    p, q = (jax.nn.log_softmax(run(t)) for t in (params(), tree))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def same(a, b) -> bool:
    """Two trees with the same leaves, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


# -- the leaf ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 16])
def test_the_product_of_an_adapter(pool: int):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    w, x, a, b = draw(24, 32), draw(3, 5, 32), draw(2, 32 // pool), draw(24, 2)
    q = formats.get("int4:g16").encode(jnp.asarray(w))
    leaf = Adapter(q, jnp.asarray(a), jnp.asarray(b), 0.25, pool)
    update = 0.25 * np.repeat(b.astype(np.float64) @ a, pool, axis=1)
    want = x.astype(np.float64) @ (np.asarray(q.decode(), np.float64) + update).T
    got = jax.jit(qdot)(x, leaf)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dense(leaf), np.asarray(q.decode()) + update, rtol=1e-5, atol=1e-5)
    half = jax.jit(qdot)(x.astype(jnp.bfloat16), leaf)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), want, rtol=0.03, atol=0.1)
    act = get_act("int8:token")  # both parts see the input that is prepared once
    seen = np.asarray(act.fake_quant(jnp.asarray(x)), np.float64) @ np.asarray(dense(leaf), np.float64).T
    np.testing.assert_allclose(jax.jit(qdot)(x, PreparedInput(leaf, act)), seen, rtol=1e-5, atol=1e-4)


def test_the_base_stays_packed_between_forward_and_backward():
    """A gradient through eight layers keeps less than one decoded weight of theirs, where plain weights in the same
    place would be counted as arguments, and a decode that is saved as one temporary for each layer."""
    n, layers = 256, 8
    q = formats.get("nf4").encode(jnp.zeros((n, n)))
    tree = jax.tree.map(lambda a: jnp.stack([a] * layers), Adapter(q, jnp.zeros((4, n)), jnp.zeros((n, 4))))

    def loss(factors, packed, x, product):
        leaves = dataclasses.replace(tree, w=packed, a=factors[0], b=factors[1])
        return jnp.sum(jax.lax.scan(lambda x, leaf: (product(x, leaf), None), x, leaves)[0])

    def naive(x, leaf):
        return x @ leaf.w.decode().T + leaf.low_rank(x)

    bytes_ = [
        jax.jit(jax.grad(loss), static_argnums=3)
        .lower((tree.a, tree.b), tree.w, jnp.ones((2, n)), product)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for product in (qdot, naive)
    ]
    assert bytes_[1] > layers * 4 * n * n > 2 * bytes_[0]


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, fmt", [("qlora:r4", "nf4:g16:dq"), ("qa-lora:r2", "int4:g16:min32")])
def test_at_the_start_the_model_is_the_rounded_one(recipe: str, fmt: str):
    got, want = run(prepared(recipe, fmt)), run(rtn.quantize(params(), assigned(fmt)))
    np.testing.assert_array_equal(got, want)


def test_training_changes_the_adapters_and_nothing_else(trained):
    before, after = (dict(trees.items(t)) for t in (prepared("qlora:r4", "nf2:g16"), trained[0]))
    for path, leaf in before.items():
        if not isinstance(leaf, Adapter):
            assert same(leaf, after[path])
            continue
        assert same(leaf.w, after[path].w)
        assert (np.asarray(after[path].b) != 0).all() and not np.array_equal(leaf.a, after[path].a)
    flat, layout = flatten(prepared("qlora:r4", "nf2:g16"))
    assert trainable(layout) == {
        f"{p}:{k}" for p, x in before.items() if isinstance(x, Adapter) for k in ("lora_a", "lora_b")
    }
    assert flat[f"{Q_PROJ}:lora_a"].shape == (4, 32) and flat["model.norm"].dtype == jnp.float32


def test_scale_lr_and_decay_leave_adapters_alone():
    from lowbit.train.optimizer import decays, factors

    names = [f"{Q_PROJ}:lora_a", f"{Q_PROJ}:lora_b", f"{Q_PROJ}:scale"]
    assert list(factors(names, TrainConfig(scale_lr=0.1)).values()) == [1.0, 1.0, 0.1]
    assert not any(decays(n, 2) for n in names)


def test_a_mesh_keeps_ranks_whole():
    mesh = AbstractMesh((1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    shapes = {f"{Q_PROJ}:lora_a": (4, 32), f"{Q_PROJ}:lora_b": (32, 4), Q_PROJ.replace("q_", "o_") + ":lora_a": (4, 32)}
    found = sharding.shard({n: jax.ShapeDtypeStruct(s, "float32") for n, s in shapes.items()}, mesh)
    assert list(found.specs.values()) == [
        PartitionSpec(None, "fsdp"),
        PartitionSpec("tensor", None),
        PartitionSpec(None, "tensor"),
    ]


def test_low_rank_is_the_truncated_svd():
    rng = np.random.default_rng(1)
    for shape in ((20, 48), (48, 20)):
        x = rng.standard_normal(shape).astype(np.float32)
        b, a = jax.jit(low_rank, static_argnums=1)(x, 5)
        u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        np.testing.assert_allclose(np.asarray(b) @ np.asarray(a), (u[:, :5] * s[:5]) @ v[:5], atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.sqrt(s[:5]), rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.sqrt(s[:5]), rtol=1e-4)


@pytest.mark.parametrize("fmt", ["nf2:g16", "int3:g16:asym"])
def test_loftq_never_raises_the_error_in_its_second_step(fmt: str):
    w = np.random.default_rng(2).standard_normal((40, 64)).astype(np.float32)
    found = loftq(formats.get(fmt), jnp.asarray(w), 6, 5)
    before, after = np.asarray(found.before), np.asarray(found.after)
    first = np.asarray(rtn.encode(formats.get(fmt), w).decode())
    assert before[0] == pytest.approx(np.linalg.norm(w - first), rel=1e-5)
    left = w - np.asarray(found.q.decode(), np.float64)
    for t in range(5):  # the adapter of the round before, for the codes of this one, is no better than its own
        assert after[t] <= before[t]
    best = np.linalg.norm(left - np.asarray(found.b) @ np.asarray(found.a))
    assert best == pytest.approx(after.min(), rel=1e-5) and after.min() < after[0] < 0.9 * before[0]
    one = loftq(formats.get(fmt), jnp.asarray(w), 6, 1)  # one round: the SVD of what rounding to nearest leaves
    u, s, v = np.linalg.svd((w - first).astype(np.float64), full_matrices=False)
    assert float(one.after[0]) == pytest.approx(np.linalg.norm(s[6:]), rel=1e-5)


def test_loftq_starts_nearer_than_qlora():
    q, l = prepared("qlora:r4", "nf2:g16"), prepared("loftq:r4", "nf2:g16")
    for path, w in trees.items(params()):
        if path in assigned("nf2:g16"):
            errors = [np.linalg.norm(np.asarray(w - dense(trees.get(t, path)))) for t in (l, q)]
            assert errors[0] < 0.85 * errors[1], path
    assert kl(l) < 0.8 * kl(q)
    scaled = prepared("loftq:r4:a16", "nf2:g16")  # any alpha starts from the same weights
    np.testing.assert_allclose(run(scaled), run(l), atol=2e-4)
    assert trees.get(scaled, Q_PROJ).scaling == 4


def test_loftq_of_a_weight_that_the_format_holds_can_still_learn():
    p = params()
    p["model"]["layers"]["0"]["self_attn"]["q_proj"] = formats.get("int4:g16:signmax").fake_quant(
        p["model"]["layers"]["0"]["self_attn"]["q_proj"]
    )
    leaf = trees.get(qat.get("loftq:r4:q").prepare(p, assigned("int4:g16:signmax")), Q_PROJ)
    assert (np.asarray(leaf.b) == 0).all() and (np.asarray(leaf.a) != 0).all()


@pytest.mark.parametrize("fmt, tolerance", [("int4:g16:min32", 3e-7), ("int2:g16:min", 2.0**-11)])
def test_qa_lora_merges_into_the_minima(fmt: str, tolerance: float):
    """Codes and scales stay, minima are `m + scaling B A` rounded to their type, and the model is the same one."""
    tree = noisy(prepared("qa-lora:r2:a4", fmt))
    packed = qat.get("qa-lora:r2").convert(tree)
    for path in assigned(fmt):
        leaf, q = trees.get(tree, path), trees.get(packed, path)
        assert all(same(q.arrays[k], leaf.w.arrays[k]) for k in ("codes", "scale")) and q.nbytes == leaf.w.nbytes
        exact = np.asarray(leaf.w.arrays["min"], np.float64) + 2 * np.asarray(leaf.b, np.float64) @ np.asarray(leaf.a)
        np.testing.assert_allclose(np.asarray(q.arrays["min"], np.float64), exact, rtol=tolerance, atol=3e-7)
        moved = np.abs(np.asarray(q.decode(), np.float64) - np.asarray(dense(leaf)))
        assert moved.max() <= tolerance * np.abs(exact).max() + 1e-6 and (np.asarray(leaf.update()) != 0).all()
    gap = float(jnp.abs(run(packed) - run(tree)).max())
    assert gap < (2e-4 if "32" in fmt else 0.1)
    assert gap < 0.02 * float(jnp.abs(run(packed) - run(prepared("qa-lora:r2:a4", fmt))).max())


@pytest.mark.parametrize("recipe, fmt", [("qlora:r4", "nf4:g16:dq"), ("loftq:r4:a8", "nf2:g16")])
def test_merged_and_unmerged_agree(recipe: str, fmt: str):
    tree = noisy(prepared(recipe, fmt))
    whole = adapters.merged(tree)
    assert all(isinstance(leaf, jax.Array) for _, leaf in trees.items(whole))
    np.testing.assert_allclose(run(whole), run(tree), atol=3e-4)
    half = adapters.merged(tree, "bfloat16")
    np.testing.assert_array_equal(trees.get(half, Q_PROJ), trees.get(whole, Q_PROJ).astype(jnp.bfloat16))
    assert same(qat.get(recipe).convert(tree), tree)


def test_a_packed_base_keeps_its_codes_and_targets_choose():
    rules = Rule(r".*\.down_proj:in", "int8:token"), Rule(r"model\.embed_tokens|.*\.(q|v|down)_proj", "int8:channel")
    assignment = Plan(rules).resolve(CONFIG.shapes())
    solved = rtn.quantize(params(), {Q_PROJ: formats.get("int8:channel")})
    out = dict(trees.items(qat.get("qlora:r2:q+down").prepare(solved, assignment)))
    assert isinstance(out[Q_PROJ], Adapter) and same(out[Q_PROJ].w, trees.get(solved, Q_PROJ))
    down = out["model.layers.1.mlp.down_proj"]
    assert isinstance(down, PreparedInput) and isinstance(down.w, Adapter) and isinstance(down.w.w, QTensor)
    packed = {p.rpartition(".")[2] for p, leaf in out.items() if isinstance(leaf, QTensor)}
    assert packed == {"embed_tokens", "v_proj"}
    everywhere = dict(trees.items(qat.get("qlora:r2").prepare(solved, assignment)))
    assert [p for p, leaf in everywhere.items() if isinstance(leaf, QTensor)] == ["model.embed_tokens"]


def test_names_are_canonical():
    assert qat.get("qlora").name == "qlora:r16:a16" and qat.get("QLoRA:a16:r64").name == "qlora:r64:a16"
    assert qat.get("loftq:t3:v+q:seed7:r8").name == "loftq:r8:a8:q+v:seed7:t3"
    assert {"qlora", "loftq", "qa-lora"} <= set(qat.names())
    a, b = (trees.get(qat.get(f"qlora:r2:seed{s}").prepare(params(), assigned("q8_0")), Q_PROJ).a for s in (0, 1))
    assert not np.array_equal(a, b) and same(a, trees.get(prepared("qlora:r2", "q8_0"), Q_PROJ).a)


# -- files and sizes --------------------------------------------------------------------------------------------------


def model(tree) -> Model:
    return Model(CONFIG, tree)


def test_packed_folders_keep_adapters(tmp_path):
    tree = noisy(prepared("qa-lora:r2:a4", "int4:g16:min32"))
    path = "model.layers.1.mlp.up_proj"
    tree["model"]["layers"]["1"]["mlp"]["up_proj"] = PreparedInput(trees.get(tree, path), get_act("int8:token"))
    save_hf(model(tree), tmp_path / "m", dtype=None, packed=True)
    again = load_hf(tmp_path / "m")
    assert same(again.params, tree)
    assert folder_sizes(tmp_path / "m") == sizes(tree)
    assert export(tmp_path / "m", "packed", tmp_path / "n")["kl_max"] == 0.0
    assert same(load_hf(tmp_path / "n").params, tree)
    rtn.quantize_dir(tmp_path / "m", {"model.embed_tokens": formats.get("q8_0")}, tmp_path / "e")  # block by block
    again = load_hf(tmp_path / "e").params
    assert isinstance(trees.get(again, "model.embed_tokens"), QTensor)
    assert all(same(trees.get(again, p), leaf) for p, leaf in trees.items(tree) if p != "model.embed_tokens")
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(config.replace('"rank": 2', '"rank": 1'))
    with pytest.raises(InputError, match=r"lora_. has shape .* \(config.json needs"):
        load_hf(tmp_path / "m")


def test_adapters_count_as_bytes_of_their_weights():
    tree = prepared("qlora:r4", "nf4:g16:dq")
    plain, own = sizes(rtn.quantize(params(), assigned("nf4:g16:dq"))), sizes(tree)
    count = sum(4 * sum(trees.get(params(), p).shape) for p in assigned("nf4:g16:dq"))
    assert own["params"] == plain["params"] and own["stored_bytes"] == plain["stored_bytes"] + 4 * count
    row = next(r for r in layer_table(tree) if r["path"] == Q_PROJ)
    assert row["format"] == "nf4:g16:dq+lora:r4" and row["bits"] > 4 + 32 * 8 / 32


def test_checkpoints_keep_adapters(trained):
    params, place = trained
    assert same(checkpoint.load(place)[0], params)
    assert same(unflatten(*flatten(params)), params)


def test_what_cannot_hold_an_adapter_says_so(tmp_path):
    m = model(noisy(prepared("qa-lora:r1:a4", "q4_1")))
    for to in ("gguf", "hf"):
        with pytest.raises(InputError, match=r"_proj has an adapter, which the target .* \(allowed: .*lowbit merge"):
            export(m, to, tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"cannot save .*_proj: it has an adapter.*\(allowed: packed, or merge"):
        save_hf(m, tmp_path / "x")
    with pytest.raises(InputError, match="cannot hold the adapter of .*q_proj"):
        save_llama2c(m, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"up_proj has an adapter \(allowed: float weights"):
        rtn.quantize(m.params, assigned("int4:g16"))
    merged = m.replace(params=qat.get("qa-lora").convert(m.params))
    report = export(merged, "gguf:Q4_1", tmp_path / "m.gguf")
    assert report["types"]["Q4_1"] == 4 and report["kl_mean"] == 0.0 and not report["fresh"]


def test_peft_folders(tmp_path):
    """Names, shapes and numbers as peft writes them; a pooled A is repeated over its groups."""
    for recipe, fmt in (("qlora:r4:a8", "nf4:g16:dq"), ("qa-lora:r2:a4", "int4:g16:min32")):
        tree = noisy(prepared(recipe, fmt))
        export_peft(model(tree), tmp_path / recipe, "base")
        tensors = load_file(tmp_path / recipe / "adapter_model.safetensors")
        config = json.loads((tmp_path / recipe / "adapter_config.json").read_text())
        assert config["target_modules"] == ["q_proj", "up_proj"] and config["base_model_name_or_path"] == "base"
        assert len(tensors) == 8
        leaf, name = trees.get(tree, Q_PROJ), f"base_model.model.{Q_PROJ}"
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert a.shape == (config["r"], 32) and b.shape == (32, config["r"])
        np.testing.assert_allclose(config["lora_alpha"] / config["r"] * b @ a, leaf.update(), rtol=1e-5, atol=1e-6)
        assert same(base(model(tree)).params, rtn.quantize(params(), assigned(fmt)))
    with pytest.raises(InputError, match="a model without adapters"):
        export_peft(model(params()), tmp_path / "none")
    only = model(qat.get("qlora:r2").prepare(params(), {Q_PROJ: formats.get("nf4:g16")}))
    export_peft(only, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == [Q_PROJ]


def test_the_merge_command(tmp_path, capsys):
    tree = noisy(prepared("qlora:r4", "nf4:g16:dq"))
    save_hf(model(tree), tmp_path / "m", dtype=None, packed=True)
    assert cli.main(["merge", str(tmp_path / "m"), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == "plain"
    assert same(load_hf(tmp_path / "out").params, adapters.merged(tree))
    assert cli.main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 2
    assert "no adapter to merge" in capsys.readouterr().err


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, fmt, message",
    [
        ("qlora:r33", "nf4:g16", r"adapter of .*: rank 33 for 48 x 32 \(allowed: 1 to 32\)"),
        ("qa-lora:r4", "int4:g16:min", r"adapter of .*: rank 4 for 48 x 2 \(allowed: 1 to 2\)"),
        ("qa-lora:r1", "nf4:g16", r"format 'nf4:g16' of .* has no float minimum .*\(allowed: q4_1, q5_1, intN:gG:min"),
        ("qa-lora:r1", "int4:g16:asym", r"format 'int4:g16:asym' of .* has no float minimum"),
        ("qlora:r4:rank8", "nf4:g16", r"unknown key of recipe qlora 'rank8' \(allowed: a16, q\+v, r16, seed0\)"),
        ("qlora:t5", "nf4:g16", r"unknown key of recipe qlora 't5'"),
        ("qlora:r4:r8", "nf4:g16", r"recipe qlora: key 'r8' gives a second rank \(allowed: one\)"),
        ("qlora:a0", "nf4:g16", r"recipe qlora: alpha 0 \(allowed: above 0\)"),
        ("ste:r4", "nf4:g16", r"recipe ste with key 'r4' \(allowed: none\)"),
        ("qlora:r4", "bf16", r"adapters with a plan that quantizes no weight"),
        ("qlroa:r4", "nf4:g16", r"unknown recipe 'qlroa:r4'; did you mean 'qlora'"),
    ],
)
def test_refused_names_and_formats(name: str, fmt: str, message: str):
    with pytest.raises(InputError, match=message) as e:
        qat.get(name).prepare(params(), assigned(fmt))
    assert "\n" not in str(e.value)


def test_refused_trees():
    p, plan = prepared("qlora:r4", "nf4:g16"), assigned("nf4:g16")
    with pytest.raises(InputError, match=r"up_proj has an adapter already \(allowed: one"):
        qat.get("qlora:r4").prepare(p, plan)
    with pytest.raises(InputError, match=r"adapter of a weight with an adapter already"):
        Adapter(trees.get(p, Q_PROJ), None, None)
    packed = rtn.quantize(params(), plan)
    with pytest.raises(InputError, match=r"up_proj is packed as nf4:g16 already \(allowed: .*packed as int4:g16\)"):
        qat.get("qlora:r4").prepare(packed, assigned("int4:g16"))
    with pytest.raises(InputError, match=r"up_proj is packed already \(allowed: float weights"):
        qat.get("loftq:r4").prepare(packed, plan)
    with pytest.raises(InputError, match=r"no quantized weight is among v \(allowed: q_proj\)"):
        qat.get("qlora:r4:v").prepare(params(), {Q_PROJ: formats.get("nf4:g16")})
    with pytest.raises(InputError, match="no adapter to merge"):
        adapters.merged(packed)
    with pytest.raises(InputError, match=r"adapter of .* over nf4:g16 does not merge into minima"):
        qat.get("qa-lora").convert(p)
    with pytest.raises(InputError, match=r"q_proj: .*min of magnitude .* \(largest in fp16: 65504\)"):
        tree = prepared("qa-lora:r1:a4", "q4_1")
        leaf = trees.get(tree, Q_PROJ)
        qat.get("qa-lora").convert({Q_PROJ: dataclasses.replace(leaf, b=leaf.b + 1e7)})
    bad = params()
    bad["model"]["layers"]["0"]["self_attn"]["q_proj"] = trees.get(bad, Q_PROJ).at[1, 2].set(jnp.nan)
    for name in ("qlora:r4", "loftq:r4"):
        with pytest.raises(InputError, match=rf"{Q_PROJ}: .*weight \[1, 2\] is nan"):
            qat.get(name).prepare(bad, plan)
