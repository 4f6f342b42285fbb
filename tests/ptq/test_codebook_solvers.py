"""Solvers of formats with codebooks: what they report is so, nothing gets worse, small cases against brute force."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.ptq import aqlm as A
from lowbit.ptq import base as solvers
from lowbit.ptq import rtn
from lowbit.ptq.gptq import gptq, quadratic_error
from lowbit.ptq.options import AqlmOptions, LnqOptions, VptqOptions
from lowbit.ptq.refit import error_of, refit
from lowbit.ptq.vptq import vptq
from tests.ptq.test_gptq import correlated, weight


def checked(r, w, h, history):
    """The packed weight is what is reported, and no turn raised the error."""
    np.testing.assert_array_equal(np.asarray(r.q.decode()), np.asarray(r.w_hat_OI))
    exact = quadratic_error(w, r.w_hat_OI, h)
    assert r.error == pytest.approx(exact, rel=2e-3)
    errors = [e for _, e in history]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)) and errors[-1] < 0.99 * errors[0]
    assert {k for k, _ in history} == {"init", "books", "codes"}
    assert exact < 0.6 * quadratic_error(w, rtn.encode(r.q.format, w).decode(), h)
    return exact


@pytest.mark.parametrize("beam", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_aqlm(beam):
    w, h, history = weight(16, 64), correlated(64), []
    checked(A.aqlm(w, h, formats.get("aqlm:2x3:g4"), beam=beam, history=history), w, h, history)


def test_aqlm_is_the_same_again():
    w, h, fmt = weight(16, 64), correlated(64), formats.get("aqlm:2x3:g4")
    a, b = (A.aqlm(w, h, fmt, beam=3).q.arrays for _ in range(2))
    assert all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


@pytest.mark.parametrize(
    "name, beam",
    [("aqlm:2x3:g4", 3), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("aqlm:2x3:g4", 1), ("aqlm:3x2:g2", 2)))],
)
def test_the_searchs_error_is_the_error_after_every_block_of_moves(name, beam):
    """Every state's, recomputed from its codes in float64; and `moved` is how far its code vectors' sums went."""
    fmt, w, h = formats.get(name), weight(8, 64), correlated(64)
    q = rtn.encode(fmt, w)
    codes, stored = q.codes()
    state = jax.jit(A.start_of, static_argnums=(0, 1))(fmt, beam, w, h, codes, stored)
    books, step = stored["codebook"][:, 0], jax.jit(A.search_block)
    G, x = 64 // fmt.size, w / np.asarray(stored["scale"])
    first, y_0 = np.asarray(state.error)[0], np.asarray(q.decode()) / np.asarray(stored["scale"])
    order = jnp.asarray(np.random.default_rng(0).permutation(G).reshape(-1, 1), jnp.int32)
    for i in range(G):
        state = step(state, books, h, order, jnp.int32(i))
        for s in range(beam):
            c = np.asarray(state.codes)[:, :, s]  # [G, M, O]
            if not np.isfinite(np.asarray(state.error)[s]).all():
                continue
            y = sum(np.asarray(books, np.float64)[m][c[:, m]] for m in range(fmt.number))  # [G, O, d]
            d = x - y.transpose(1, 0, 2).reshape(8, 64)
            np.testing.assert_allclose(np.asarray(state.error)[s], np.sum(d @ h * d, axis=1), rtol=1e-3)
            np.testing.assert_allclose(np.asarray(state.moved)[:, s].T, x - d - y_0, atol=1e-5)
    last = np.asarray(state.error)
    assert (last[0] < first).all() and (np.diff(last, axis=0) >= 0).all()
    if beam > 1:
        flat = np.asarray(state.codes).transpose(2, 3, 0, 1).reshape(beam, 8, -1)
        assert all(len({tuple(flat[s, o]) for s in range(beam)}) == beam for o in range(8))  # no state twice


@pytest.mark.parametrize("beam", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rows_searched_apart_get_the_same_codes(beam, monkeypatch):
    """Rows are independent: eleven at once, or four at a time."""
    fmt, w, h = formats.get("aqlm:2x3:g4"), jnp.asarray(weight(11, 32)), jnp.asarray(correlated(32))
    codes, stored = rtn.encode(fmt, w).codes()
    order = A.order_of(fmt, codes.shape[1], np.random.default_rng(0))
    want, error = A.sweep(fmt, beam, w, h, codes, stored, order)
    monkeypatch.setattr(A, "rows_at_once", lambda *a: 4)
    got, other = jax.jit(A.sweep.__wrapped__, static_argnums=(0, 1))(fmt, beam, w, h, codes, stored, order)
    np.testing.assert_array_equal(got, want)
    assert float(other) == pytest.approx(float(error), rel=1e-5)
    exact = quadratic_error(w, fmt.dequantize(got, stored), np.asarray(h))
    assert float(other) == pytest.approx(exact, rel=1e-4)


def test_a_search_holds_no_more_than_it_says():
    """XLA's temporary buffers: below the bound where the weight is twice that, and where one row's scores are large."""
    for name, beam, O, I in (("aqlm:1x8:g8", 1, 70001, 1024), ("aqlm:1x16:g8", 8, 1024, 1024)):
        fmt = formats.get(name)
        shapes = (O, I), (I, I), (fmt.number, 1, 2**fmt.bits, fmt.size), (O, 1)
        w, h, book, scale = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
        codes = jax.ShapeDtypeStruct((O, I // fmt.size * fmt.number), jnp.int32)
        order = A.order_of(fmt, codes.shape[1], np.random.default_rng(0))
        program = A.sweep.lower(fmt, beam, w, h, codes, {"codebook": book, "scale": scale}, order).compile()
        assert program.memory_analysis().temp_size_in_bytes < A.SPACE


def test_a_beam_as_wide_as_all_codes_finds_the_best_ones():
    """Two groups and two codebooks of two vectors: sixteen sums, all tried."""
    fmt, w, h = formats.get("aqlm:2x1:g2"), weight(6, 4), correlated(4, rank=2)
    codes, stored = rtn.encode(fmt, w).codes()
    got, error = A.sweep(fmt, 16, jnp.asarray(w), jnp.asarray(h), codes, stored, np.array([[1, 0]]))
    books, scale = np.asarray(stored["codebook"], np.float64)[:, 0], np.asarray(stored["scale"], np.float64)
    best = np.full(6, np.inf)
    for a in itertools.product(range(2), repeat=4):
        y = np.concatenate([books[0][a[0]] + books[1][a[1]], books[0][a[2]] + books[1][a[3]]])
        d = w - scale * y
        best = np.minimum(best, np.sum(d @ h * d, axis=1))
    assert float(error) == pytest.approx(best.sum(), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "vptq:v4:k16",
        "nuq2",
        pytest.param("vptq:v2:k8:o6:s", marks=pytest.mark.slow),
        pytest.param("vptq:v4:k8:r8", marks=pytest.mark.slow),
        pytest.param("gptvq:v2:k4:c32:n8", marks=pytest.mark.slow),
    ],
)
def test_vptq(name):
    w, h, history = weight(32, 64), correlated(64), []
    checked(vptq(w, h, formats.get(name), order="columns", tol=0.0, history=history), w, h, history)


@pytest.mark.slow
def test_outlier_columns_are_those_that_matter_and_help():
    w, h = weight(64, 64), np.eye(64, dtype=np.float32)
    w[:, [5, 40]] *= 20
    plain, apart = (vptq(w, h, formats.get(n), turns=0) for n in ("vptq:v4:k32", "vptq:v4:k32:o2"))
    np.testing.assert_array_equal(apart.q.arrays["outlier"], [[5, 40]])
    assert apart.error < 0.5 * plain.error


@pytest.mark.slow
def test_gptq_takes_formats_of_one_stage():
    w, h = weight(32, 64), correlated(64)
    for name in ("vptq:v4:k16", "nuq2", "aqlm:1x4:g4"):
        r = gptq(w, h, formats.get(name), act_order=True)
        np.testing.assert_array_equal(np.asarray(r.q.decode()), np.asarray(r.w_hat_OI))
        assert quadratic_error(w, r.w_hat_OI, h) < 0.7 * quadratic_error(w, rtn.encode(r.q.format, w).decode(), h)


@pytest.mark.parametrize(
    "name", ["nuq2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("aqlm:2x2:g2", "vptq:v4:k4:r4"))]
)
def test_refit_is_the_least_squares_solution(name):
    """Against the normal equations in float64, built one unknown at a time; fp16 codebooks lose a little."""
    fmt, w, h = formats.get(name), weight(8, 32), correlated(32)
    codes, stored = rtn.encode(fmt, w).codes()
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(32, dtype=np.float32)
    w, h = jnp.asarray(w), jnp.asarray(h)
    before = error_of(w, fmt.dequantize(codes, stored), h)
    new, error = refit(fmt, 40, w, h, codes, stored, before)
    own = [k for k in stored if k != "scale"]
    sizes = [stored[k].size for k in own]
    fixed = {k: new[k] for k in stored if k == "scale"}  # as found, so that the problem is linear

    @jax.jit
    def columns(flat):
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        return fmt.dequantize(codes, {**{k: p.reshape(stored[k].shape) for k, p in zip(own, parts)}, **fixed})

    L = np.asarray(jax.vmap(columns)(jnp.eye(sum(sizes))), np.float64)  # [n, O, I]
    normal = np.einsum("aoi,ij,boj->ab", L, h, L)
    x = np.linalg.lstsq(normal, np.einsum("aoi,ij,oj->a", L, h, w), rcond=1e-10)[0]
    least = quadratic_error(w, np.einsum("a,aoi->oi", x, L), h)
    assert float(error) < 0.995 * float(before)
    assert float(error) == pytest.approx(quadratic_error(w, fmt.dequantize(codes, new), h), rel=1e-4)
    assert least <= float(error) * (1 + 1e-6) and float(error) <= least * (1.03 if fmt.scaled else 1.002)


@pytest.mark.slow
def test_bad_input():
    fmt, w, h = formats.get("aqlm:1x4:g4"), weight(16, 32), correlated(32)
    with pytest.raises(InputError, match=r"Hessian of x\.y holds NaN"):
        A.aqlm(w, np.where(np.eye(32) == 1, np.nan, h), fmt, name="x.y")
    with pytest.raises(InputError, match=r"Hessian of x\.y has shape \[31, 31\]"):
        A.aqlm(w, h[:31, :31], fmt, name="x.y")
    with pytest.raises(InputError, match="not positive definite with damping 1"):
        vptq(w, h - 1e4 * (1 - np.eye(32, dtype=np.float32)), formats.get("nuq2"))
    with pytest.raises(InputError, match=r"weight holds NaN"):
        A.aqlm(np.where(w > 2, np.inf, w), h, fmt)
    with pytest.raises(InputError, match="codebooks of 1024 values, which cost 32 bits per weight"):
        A.aqlm(w, h, formats.get("aqlm:1x8:g4"))
    with pytest.raises(InputError, match="format 'nuq2' with solver aqlm"):
        A.aqlm(w, h, formats.get("nuq2"))
    with pytest.raises(InputError, match="format 'int4:g32' with solver vptq"):
        vptq(w, h, formats.get("int4:g32"))
    with pytest.raises(InputError, match="format 'vptq:v4:k4' with solver lnq"):
        from lowbit.ptq.vptq import _check_lnq

        _check_lnq(formats.get("vptq:v4:k4"), "lnq")
    for options, message in (
        (lambda: AqlmOptions(beam=0), "aqlm beam is 0"),
        (lambda: VptqOptions(tol=1.0), "vptq tol is 1.0"),
        (lambda: LnqOptions(cycles=0), "lnq cycles is 0"),
    ):
        with pytest.raises(InputError, match=message):
            options()


@pytest.mark.slow
@pytest.mark.parametrize("solver, name", [("aqlm", "aqlm:1x4:g4"), ("vptq", "vptq:v4:k16"), ("lnq", "nuq2")])
def test_command_and_resume(solver, name, tmp_path, capsys, monkeypatch):
    """A folder through the command; interrupted after the first blocks, the same call gives the same bytes."""
    from lowbit.models.hf import save_hf
    from lowbit.ptq import folder
    from tests.export.small_models import byte_model

    save_hf(byte_model(num_layers=2), tmp_path / "m")
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    call = ["quantize", str(tmp_path / "m"), "--format", name, "--solver", solver, "--calib", str(text), "--json"]
    call += [f"--{solver}.rows", "4", f"--{solver}.length", "32"]
    assert main([*call, "--out", str(tmp_path / "a")]) == 0
    assert 1 < json.loads(capsys.readouterr().out)["bits_per_weight_quantized"] < 12
    write, done = folder.write_block, []

    def some(*args, **more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(write(*args, **more))

    monkeypatch.setattr(folder, "write_block", some)
    with pytest.raises(KeyboardInterrupt):
        src, plan, out, _, documents = resumed(tmp_path, name, text)
        solvers.get(solver).quantize_dir(src, plan, out, None, documents, rows=4, length=32)
    monkeypatch.setattr(folder, "write_block", write)
    src, plan, out, _, documents = resumed(tmp_path, name, text)
    solvers.get(solver).quantize_dir(src, plan, out, None, documents, rows=4, length=32)
    for a in sorted((tmp_path / "a").glob("*.safetensors")):
        assert a.read_bytes() == (out / a.name).read_bytes()


def resumed(tmp_path, name, text):
    from lowbit.plan import Plan

    return tmp_path / "m", Plan.uniform(name), tmp_path / "b", None, [text.read_text()]
