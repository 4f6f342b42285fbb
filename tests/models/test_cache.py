"""The cache shows a query what evaluation in one shot shows it, whatever the chunks, the batch and the format."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.evaluate.size import layer_table, sizes
from lowbit.export.api import export
from lowbit.formats.kv import get_kv
from lowbit.linalg import online
from lowbit.models import cache as caches
from lowbit.models import generate as g
from lowbit.models.cache import CacheSite, Packed, append, cache_bytes, init_cache, with_caches
from lowbit.models.decoder import head
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import with_inputs
from lowbit.models.nnx import from_nnx, to_nnx
from lowbit.plan import Plan, Rule, render
from lowbit.train.params import flatten, trainable, unflatten
from tests.models.tiny import CONFIGS, LLAMA, forward, hidden_states, tiny

T = 24
TOKENS = np.random.default_rng(0).integers(0, 61, (2, T))
FORMATS = [
    ("int8", "int8", False),
    ("int4:g4:asym", "int3:asym:w3", True),
    ("int2:channel:g4:asym:w8", "int2:asym:w5", True),
    ("int3:channel:g8", None, False),
    (None, "fp8:channel:g4", True),
    ("fp8:token", "fp8:g4:w2", False),
]


def wide(model):
    """In float64, where no rounding tie of a code depends on the order of a sum."""
    return model.replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.params))


def feeder(model, scan=False, dtype=jnp.float32):
    """A compiled step: some tokens of each row after those that the cache has."""
    c = model.config

    def advance(params, cache, tokens, counts):
        x, cache = hidden_states(params, tokens, c, cache=cache, count_B=counts, scan=scan, dtype=dtype)
        return head(params, x, c), cache

    return jax.jit(advance)


def steps(model, chunks, advance=None, dtype=jnp.float32):
    """Logits of every position, fed in chunks `(tokens of row 0, tokens of row 1, padded to)`."""
    advance = advance or feeder(model)
    cache, got, at = init_cache(model.params, model.config, 2, T + 3, dtype), [[], []], [0, 0]
    for *counts, width in chunks:
        tokens = np.full((2, width), 7)
        for row, n in enumerate(counts):
            tokens[row, :n] = TOKENS[row, at[row] : at[row] + n]
            at[row] += n
        counts32 = jnp.asarray(counts, jnp.int32)
        logits, cache = advance(model.params, cache, jnp.asarray(tokens, jnp.int32), counts32)
        for row, n in enumerate(counts):
            got[row].append(np.asarray(logits)[row, :n])
    assert at == [T, T] and cache.length.tolist() == [T, T]
    return np.stack([np.concatenate(parts) for parts in got])


RAGGED = [(5, 9, 12), (1, 1, 1), (6, 0, 12), (1, 1, 1), (2, 11, 12), (7, 0, 12), (1, 1, 1), (1, 1, 1)]


slow = pytest.mark.slow
CASES = [pytest.param("llama", 2, FORMATS[2], marks=slow), pytest.param("mistral", 3, FORMATS[1], marks=slow)]
CASES += [pytest.param("llama", 1, f, marks=() if i in (3, 5) else slow) for i, f in enumerate(FORMATS)]
CASES += [pytest.param("gemma3", 3, FORMATS[2], marks=slow), pytest.param("llama", 7, FORMATS[1], marks=slow)]


@pytest.mark.parametrize("name, layers, formats", CASES)
def test_one_shot_prefill_and_decoding_agree(name, layers, formats):
    with jax.enable_x64(True):
        plain = wide(tiny(name, num_layers=layers))
        model = with_caches(plain, *formats)
        want = np.asarray(forward(model.params, jnp.asarray(TOKENS, jnp.int32), model.config, dtype=jnp.float64))
        exact = np.asarray(forward(plain.params, jnp.asarray(TOKENS, jnp.int32), model.config, dtype=jnp.float64))
        assert np.abs(want - exact).max() > 1e-3
        advance = feeder(model, False, jnp.float64)
        for chunks in ([(1, 1, 1)] * T, RAGGED):
            got = steps(model, chunks, advance, jnp.float64)
            np.testing.assert_allclose(got, want, atol=1e-9, err_msg=str(chunks[0]))
        if layers > 1:
            got = steps(model, [(T, T, T)], feeder(model, True, jnp.float64), jnp.float64)
            np.testing.assert_allclose(got, want, atol=1e-9)


def test_in_float32_too():
    model = with_caches(tiny(num_layers=1), "int8:channel:g4:w8", "int8:w3", True)
    want = np.asarray(model.logits(TOKENS))  # one code of 8 bits may round to the other side
    np.testing.assert_allclose(steps(model, RAGGED), want, atol=2e-2)


@pytest.mark.parametrize(
    "name",
    ["int4:asym", "int2:channel:g4:asym:w8"]
    + [pytest.param(n, marks=slow) for n in ("int3:w5", "fp8:channel:g8", "int6:channel:g8:w8")],
)
def test_appended_blocks_are_those_of_one_shot_and_never_change(name):
    """Many flushes, rows of different lengths; every write leaves the blocks that were there alone."""
    fmt, S, K, D = get_kv(name), 48, 2, 8
    x = np.random.default_rng(1).standard_normal((2, S, K, D)).astype(np.float32)
    model = with_caches(tiny(max_position=64, num_layers=1), name, name)
    side, length = init_cache(model.params, model.config, 2, S).layers[0].k, np.zeros(2, int)
    once = fmt.encode(jnp.asarray(x).reshape(2, S // fmt.tokens, fmt.tokens, K, D))
    once = {k: np.asarray(a) for k, a in once.items()}
    push = jax.jit(append)
    rng = np.random.default_rng(2)
    while (length < S).any():
        width = int(rng.choice([1, 1, 3, 7]))
        count = np.minimum(rng.integers(0, width + 1, 2), S - length)
        new = np.full((2, width, K, D), 99, np.float32)  # what is padding has to leave no trace
        for row in range(2):
            new[row, : count[row]] = x[row, length[row] : length[row] + count[row]]
        before = side
        side, seen = push(side, jnp.asarray(new), jnp.asarray(length, jnp.int32), jnp.asarray(count, jnp.int32))
        side_ring = np.asarray(side.ring) if fmt.ring else None
        arrays, was = ({k: np.asarray(a) for k, a in each.arrays.items()} for each in (side, before))
        for row in range(2):
            old, now = length[row] // fmt.tokens, (length[row] + count[row]) // fmt.tokens
            for key, a in arrays.items():
                np.testing.assert_array_equal(a[row, :old], was[key][row, :old])
                np.testing.assert_array_equal(a[row, :now], once[key][row, :now])
                assert not a[row, now:].any()
            last = length[row] + count[row]
            exact = range(max(0, last - fmt.ring), last) if fmt.ring else ()
            for s in exact:
                np.testing.assert_array_equal(side_ring[row, s % fmt.ring], x[row, s])
        length = length + count
    want = fmt.fake_quant(jnp.asarray(x))
    np.testing.assert_array_equal(fmt.decode(side.arrays, K, D).reshape(want.shape), want)


def test_the_window_is_exact_and_no_longer():
    plain = tiny()
    want = np.asarray(plain.logits(TOKENS))
    for name, w, first in (("int2:w9", 9, 9), ("int2:channel:g4:w8", 8, 11)):
        got = np.asarray(with_caches(plain, name, name).logits(TOKENS))
        np.testing.assert_allclose(got[:, :first], want[:, :first], atol=2e-5)
        assert np.abs(got[:, first] - want[:, first]).max() > 1e-2
        # A key of the last w tokens reaches the query as it is: its gradient is the exact one.
        fmt = get_kv(name)
        x = jnp.asarray(np.random.default_rng(3).standard_normal((1, T, 2, 8)), jnp.float32)
        seen = caches.fresh(CacheSite(fmt), x, jnp.arange(T)[None])
        t = T - 1
        view = jnp.where(seen.rule[0, t, :, None, None], seen.quantized[0], seen.exact[0])
        np.testing.assert_array_equal(view[t + 1 - w :], x[0, t + 1 - w :])
        assert (np.abs(view - x[0]).max((1, 2))[: t + 1 - w - fmt.tokens] > 0).all()


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=slow), pytest.param("qwen3", marks=slow)])
def test_transforms_alone_change_nothing(name):
    model = tiny(name)
    want = np.asarray(model.logits(TOKENS))
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    dense = online.Kronecker(jnp.ones((1, 1)), jnp.asarray(q, jnp.float32))
    for op in (online.get("hadamard:4"), dense):
        flat = dict(trees.items(model.params))
        rotated = model.replace(params=trees.build(flat | {p: CacheSite(None, op) for p in caches.paths(model.config)}))
        np.testing.assert_allclose(rotated.logits(TOKENS), want, atol=2e-4)
        np.testing.assert_allclose(steps(rotated, RAGGED), want, atol=2e-4)
        keys = model.replace(
            params=trees.build(flat | {p: CacheSite(None, op) for p in caches.paths(model.config)[::2]})
        )
        assert set(caches.sites(keys.params)) == {f"model.layers.{i}.self_attn.k_cache" for i in range(3)}
        np.testing.assert_allclose(keys.logits(TOKENS), want, atol=2e-4)


def test_a_rotation_helps_where_a_channel_sticks_out():
    model = tiny()
    for layer in model.params["model"]["layers"].values():
        attn = layer["self_attn"]
        attn["v_proj"] = attn["v_proj"].at[3].mul(30)  # one channel of a head
    want = jax.nn.log_softmax(model.logits(TOKENS))
    kl = lambda m: float((jnp.exp(want) * (want - jax.nn.log_softmax(m.logits(TOKENS)))).sum(-1).mean())  # noqa: E731
    assert kl(with_caches(model, None, "int6", True)) < 0.5 * kl(with_caches(model, None, "int6"))


@pytest.mark.parametrize(
    "formats", [pytest.param(("int2:channel:g4:asym:w8", "int3:asym:w5", True), marks=slow), ("int4", None, False)]
)
def test_a_row_does_not_depend_on_its_batch(formats):
    prompts = [[1, 5, 9, 33, 20], [1], [1, 7, 60, 3, 12, 44, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
    with jax.enable_x64(True):
        plain = wide(tiny(num_layers=1))
        model = with_caches(plain, *formats)
        options = {"stop_at_eos": False, "dtype": jnp.float64}
        together = g.generate(model, prompts, 14, **options)
        assert together == [g.generate(model, [p], 14, **options)[0] for p in prompts]
        assert together != g.generate(plain, prompts, 14, **options)
        assert together[2] == list(g.stream(model, prompts[2], 14, **options))


@pytest.mark.slow
def test_equal_layers_scan_and_gradients_pass():
    model = with_caches(tiny(num_layers=2), "int3:channel:g4:w4", "int2", True)
    x = jnp.asarray(TOKENS, jnp.int32)
    assert "= scan[" in str(jax.make_jaxpr(lambda p: hidden_states(p, x, model.config, scan=True))(model.params))
    with jax.enable_x64(True):
        run = lambda scan: hidden_states(wide(model).params, x, model.config, scan=scan, dtype=jnp.float64)[0]  # noqa: E731
        np.testing.assert_allclose(run(True), run(False), atol=1e-9)
    grads = jax.jit(jax.grad(lambda p: forward(p, x, model.config, remat="full").std()))(model.params)
    for path, leaf in trees.items(grads):
        assert isinstance(leaf, CacheSite) or np.abs(np.asarray(leaf)).max() > 0, path


def test_bytes_are_those_of_the_arrays():
    c = dataclasses.replace(LLAMA, num_layers=2)
    S, K, D, B = 64, c.num_kv_heads, c.head_dim, 3
    for k, v, side_k, side_v in (
        (None, None, 4 * S * K * D, 4 * S * K * D),
        ("int4", "int8", S * K * (D // 2 + 2), S * K * (D + 2)),
        ("int2:g4:asym", "fp8", S * (K * (D // 4 + 2 * 2) + 1), S * K * (D + 2)),
        ("int2:channel:g16:asym:w16", "int3:w5", S * K * D // 4 + S // 16 * (2 * K * D + K * D // 4) + 4 * 32 * K * D,
         S * K * (3 + 2) + 4 * 6 * K * D),
    ):  # fmt: skip
        params = with_caches(tiny(num_layers=2), k, v).params
        cache = init_cache(params, c, B, S)
        assert sum(a.nbytes for a in jax.tree.leaves(cache.layers)) == cache_bytes(params, c, B, S)
        assert cache_bytes(params, c, B, S) == 2 * B * (side_k + side_v)
        half = cache_bytes(caches.without(params), c, B, S, "bfloat16")
        assert half == 2 * 2 * B * 2 * S * K * D
    assert isinstance(cache.layers[1].k, Packed) and cache.layers[1].k.ring.shape == (B, 32, K, D)
    sizes_of = [init_cache(params, c, 1, n).layers[0].v.arrays["codes"].shape[1] for n in (1, 16, 17)]
    assert sizes_of == [16, 16, 32]  # whole blocks on both sides


# -- a site in a tree -------------------------------------------------------------------------------------------------

RULES = (
    Rule(r"model\.layers\.0\..*k_cache", "int8"),
    Rule(r".*k_cache", "int2:channel:g4:asym:w8"),
    Rule(r".*\.v_cache", "int4:g4"),
)


def planned():
    """A model whose caches a plan chose, and one transform with arrays."""
    model = tiny()
    assignment = Plan(RULES).resolve(model.config.shapes())
    params, rest = caches.attach(model.params, assignment)
    assert rest == {} and len(caches.sites(params)) == 6
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    site = params["model"]["layers"]["1"]["self_attn"]
    site["v_cache"] = dataclasses.replace(
        site["v_cache"], op=online.Kronecker(jnp.ones((1, 1)), jnp.asarray(q, jnp.float32))
    )
    site["k_cache"] = dataclasses.replace(site["k_cache"], op=online.get("hadamard:8"))
    return model.replace(params=params)


def names(params):
    return {path: site.name for path, site in caches.sites(params).items()}


def test_a_plan_chooses():
    model = planned()
    assert names(model.params)["model.layers.0.self_attn.k_cache"] == "int8:token"
    assert names(model.params)["model.layers.1.self_attn.k_cache"] == "int2:channel:g4:asym:w8 + hadamard:8"
    rows = Plan(RULES, "int4:g16").table(model.config.shapes())
    cached = [r for r in rows if r.site.endswith("_cache")]
    assert len(cached) == 6 and all(r.bytes == 0 and r.shape == (16,) for r in cached)
    plain = Plan((), "int4:g16").table(model.config.shapes())
    assert [r for r in rows if r not in cached] == plain
    text = render(rows)
    assert "layers.{1-2}.self_attn.k_cache" in text and render(plain).splitlines()[-1] == text.splitlines()[-1]
    with pytest.raises(InputError, match="cache format int8:token for model.layers.9.self_attn.k_cache"):
        caches.attach(model.params, {"model.layers.9.self_attn.k_cache": get_kv("int8")})
    latent = qat.get("ste").prepare(tiny().params, Plan(RULES, "int4:g16").resolve(model.config.shapes()))
    assert len(caches.sites(latent)) == 6
    assert names(qat.get("ste").convert(latent)) == names(latent)


def test_round_trips(tmp_path):
    model = planned()
    want = np.asarray(model.logits(TOKENS))
    save_hf(model, tmp_path / "packed", dtype=None, packed=True)
    again = load_hf(tmp_path / "packed")
    flat, layout = flatten(model.params)
    for other in (again.params, unflatten(flat, layout), from_nnx(to_nnx(model)).params):
        assert names(other) == names(model.params)
        np.testing.assert_array_equal(model.replace(params=other).logits(TOKENS), want)
    assert not [n for n in trainable(layout) if "_cache" in n]
    save_hf(model, tmp_path / "plain", dtype="float32")
    assert names(load_hf(tmp_path / "plain").params) == {}
    free = sizes(tiny().params)
    assert sizes(model.params) == free | {  # a transform's matrices are stored
        k: f(v) for k, v, f in [
            ("stored_bytes", free["stored_bytes"], lambda v: v + 4 * 65),
            ("bits_per_weight", 0, lambda _: 8 * (free["stored_bytes"] + 260) / free["params"]),
        ]
    }  # fmt: skip
    row = next(r for r in layer_table(model.params) if r["path"].endswith("0.self_attn.k_cache"))
    assert row["format"] == "int8:token" and row["bytes"] == 0 and row["bits"] == 0.0


@pytest.mark.parametrize("folder", [False, True])
def test_exports_say_what_they_cannot_hold(tmp_path, folder):
    model = planned()
    source = model
    if folder:
        save_hf(model, tmp_path / "source", dtype=None, packed=True)
        source = tmp_path / "source"
    for to in ("gguf:F32", "hf:float32"):
        with pytest.raises(InputError, match=r"k_cache has the cache format int8:token, .*drop_activations"):
            export(source, to, tmp_path / "refused")
        report = export(source, to, tmp_path / to.partition(":")[0], drop_activations=True)
        assert report["kl_max"] < 1e-5
    report = export(source, "packed", tmp_path / "again")
    assert names(load_hf(tmp_path / "again").params) == names(model.params) and report["kl_max"] < 1e-6
    turned = model.replace(
        params=trees.map_leaves(
            lambda _, a: CacheSite(None, online.get("hadamard:8")) if isinstance(a, CacheSite) else a, model.params
        )
    )
    assert export(turned, "hf:float32", tmp_path / "turned")["kl_max"] < 1e-5


def test_refusals(tmp_path):
    model = tiny()
    for formats, message in (
        (("int5:g16",), "int5:token:g16: heads of 8 values"),
        (("int1",), "unknown cache format 'int1'"),
        ((None, "int2:channel:g8:w4"), "window of 4 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            with_caches(model, *formats)
    with pytest.raises(InputError, match="k_cache is transformed already by hadamard:8"):
        with_caches(with_caches(model, "int4", None, True), "int8", None, True)
    with pytest.raises(InputError, match="rotation of heads of 14 values, of which no Hadamard .*hadamard:2.*dct:14"):
        with_caches(tiny(head_dim=14), "int4", "int4", True)
    skew = online.Kronecker(jnp.ones((1, 1)), jnp.eye(8) + 0.1)
    with pytest.raises(InputError, match="kronecker:1x8 is .* off .*orthogonal"):
        CacheSite(None, skew).check(8)
    channel = with_caches(model, "int4:channel:g4")
    segments = jnp.zeros((2, T), jnp.int32)
    with pytest.raises(InputError, match="segments together with cache format int4:channel:g4"):
        forward(channel.params, jnp.asarray(TOKENS, jnp.int32), model.config, segments_BT=segments)
    cache = init_cache(channel.params, model.config, 2, 9)
    with pytest.raises(InputError, match="24 tokens for a cache of 12 positions"):
        hidden_states(channel.params, jnp.asarray(TOKENS, jnp.int32), model.config, cache=cache)
    save_hf(channel, tmp_path / "m", dtype=None, packed=True)
    config = (tmp_path / "m/config.json").read_text()
    for old, new, message in (
        ("layers.0.self_attn.k_cache", "layers.7.self_attn.k_cache", "cache formats to what is no cache.*layers.7"),
        ("int4:channel:g4", "int4:channle:g4", "unknown cache format"),
        ("int4:channel:g4", "int4:token:g16", "heads of 8 values"),
    ):
        (tmp_path / "m/config.json").write_text(config.replace(old, new, 1))
        with pytest.raises(InputError, match=message):
            load_hf(tmp_path / "m")


def test_segments_with_a_token_format_are_separate_documents():
    model = with_caches(tiny(), None, "int3:w3", True)  # values: keys have other codes at other positions
    segments = jnp.asarray([[0] * 9 + [1] * 15] * 2, jnp.int32)
    got = forward(model.params, jnp.asarray(TOKENS, jnp.int32), model.config, segments_BT=segments)
    parts = [model.logits(TOKENS[:, a:b]) for a, b in ((0, 9), (9, T))]
    np.testing.assert_allclose(got, np.concatenate(parts, axis=1), atol=2e-4)


def test_inputs_of_every_block_linear():
    model = with_inputs(tiny("qwen2"), "int8:token")
    assert sum(getattr(a, "act", None) is not None for _, a in trees.items(model.params)) == 21
    assert 0 < np.abs(np.asarray(model.logits(TOKENS) - tiny("qwen2").logits(TOKENS))).mean() < 0.5
    for act, message in (
        ("int8:tensor", "stores its scale"),
        ("int4:token:g64", "input of 32 features"),
        ("int9:token", "unknown activation format"),
    ):
        with pytest.raises(InputError, match=message):
            with_inputs(tiny(), act)
    with pytest.raises(InputError, match="quantizes its input already, to int8:token"):
        with_inputs(model, "int8:token")


@pytest.mark.slow
def test_every_kind_of_model_takes_a_cache():
    assert {len(c.sliding_layers) > 0 for c in CONFIGS.values()} == {True, False}
    for name in ("gemma2", "bit", "llama3"):
        model = with_caches(tiny(name), "int8", "int8")
        off = np.abs(np.asarray(model.logits(TOKENS) - tiny(name).logits(TOKENS)))
        assert 0 < off.mean() < 0.1 and math.isfinite(off.max())
