"""The best path through small trellises, by trying all of them, and its bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.vq.viterbi import Trellis, batch_of, inputs_of, short, states_at, states_of, tail_biting, viterbi

CASES = [(4, (1,), 1, 6), (5, (2,), 2, 4), (4, (1, 2), 1, 4), (6, (3, 2), 1, 4), (6, (6,), 1, 2)]
RNG = np.random.default_rng(0)


def all_paths(L: int, widths: list[int]) -> np.ndarray:
    """Every path of as many steps as there are widths, `[paths, steps]`."""
    s = np.arange(2**L)[:, None]
    for width in widths[1:]:
        u = np.arange(2**width)
        s = np.repeat(s, len(u), axis=0)
        s = np.concatenate([s, ((s[:, -1:] << width) | np.tile(u, len(s) // len(u))[:, None]) & (2**L - 1)], axis=1)
    return s


def costs(table: np.ndarray, x: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Squared error of one tile's paths, in float64."""
    return ((table.astype("f8")[:, states].transpose(1, 2, 0) - x.astype("f8")) ** 2).sum((1, 2))


@pytest.mark.parametrize("L, widths, V, N", CASES)
def test_viterbi_finds_the_best_of_all_paths(L: int, widths: tuple[int, ...], V: int, N: int):
    trellis, cycle = Trellis(L, widths, V), [widths[n % len(widths)] for n in range(N)]
    table = RNG.standard_normal((V, 2**L)).astype(np.float16).astype(np.float32)
    x = np.asarray(short(jnp.asarray(RNG.standard_normal((3, N, V)), jnp.float32)))
    paths = all_paths(L, cycle)
    shared = paths[:, 0] >> widths[0]
    closed = (paths[:, -1] & (2 ** (L - widths[0]) - 1)) == shared
    free = np.asarray(viterbi(trellis, table, x, jnp.zeros(3, jnp.int32), free=True))
    tied = np.asarray(tail_biting(trellis, table, x))
    for b in range(3):
        every = costs(table, x[b], paths)
        np.testing.assert_allclose(costs(table, x[b], free[b : b + 1]), every.min(), rtol=1e-6)
        for overlap in np.unique(shared[closed])[:4]:
            got = np.asarray(viterbi(trellis, table, x, jnp.full(3, overlap, jnp.int32)))[b : b + 1]
            assert got[0, 0] >> widths[0] == overlap
            np.testing.assert_allclose(costs(table, x[b], got), every[closed & (shared == overlap)].min(), rtol=1e-6)
        # Algorithm 4 chooses the overlap by a path with free ends: it need not be the best, but the path is closed.
        assert (paths[closed] == tied[b]).all(axis=1).any()
        assert costs(table, x[b], tied[b : b + 1]) >= every[closed].min() * (1 - 1e-6)


def test_algorithm_4_is_near_the_best_closed_path():
    trellis = Trellis(6, (1,))
    table = RNG.standard_normal((1, 64)).astype(np.float16).astype(np.float32)
    x = RNG.standard_normal((40, 64, 1)).astype(np.float32)
    best = np.full(40, np.inf)
    for overlap in range(32):
        states = np.asarray(viterbi(trellis, table, x, jnp.full(40, overlap, jnp.int32)))
        best = np.minimum(best, [costs(table, x[b], states[b : b + 1])[0] for b in range(40)])
    got = np.asarray(tail_biting(trellis, table, x, batch=7))
    got = np.array([costs(table, x[b], got[b : b + 1])[0] for b in range(40)])
    assert (got >= best * (1 - 1e-6)).all() and got.mean() < 1.02 * best.mean()


@pytest.mark.parametrize("widths", [(1,), (2, 3), (8,)])
def test_path_does_not_depend_on_the_batch_or_on_what_it_is_compiled_with(widths: tuple[int, ...]):
    trellis = Trellis(9, widths)
    table = RNG.standard_normal((1, 512)).astype(np.float16).astype(np.float32)
    x = RNG.standard_normal((12, 16, 1)).astype(np.float32)
    x[3] = 0.0
    x[4, 5] = 3e4  # an outlier does not swallow its neighbours
    x[5] = table[0, 77]
    want = np.asarray(tail_biting(trellis, table, x))
    inside = jax.jit(lambda t, x: tail_biting(trellis, 2 * t - t, x * 3 - 2 * x, batch=5).T * 2 + 1)(table, x)
    np.testing.assert_array_equal(np.asarray(inside), want.T * 2 + 1)
    np.testing.assert_array_equal(jax.vmap(lambda x: tail_biting(trellis, table, x))(x[:, None])[:, 0], want)
    calm = x[4:5].copy()
    calm[0, 5] = 300.0
    error = (table[0, np.asarray(tail_biting(trellis, table, calm))[0]] - calm[0, :, 0]) ** 2
    wild = (table[0, want[4]] - x[4, :, 0]) ** 2
    assert np.delete(wild, 5).sum() < 1.1 * np.delete(error, 5).sum() + 0.1


@pytest.mark.parametrize("L, widths, V", [(10, (2,), 1), (16, (1,), 1), (12, (2, 3), 1), (16, (8,), 2), (9, (5,), 2)])
def test_states_come_back_from_their_bits_in_parallel_and_one_by_one(L: int, widths: tuple[int, ...], V: int):
    trellis, N = Trellis(L, widths, V), 64
    u = np.stack([RNG.integers(0, 2 ** widths[n % len(widths)], 5) for n in range(N)], axis=1)
    s, state = np.empty((5, N), np.int64), np.zeros(5, np.int64)
    for n in itertools.chain(range(N), range(N)):  # twice around: the first time from a state that is not known
        state = ((state << widths[n % len(widths)]) | u[:, n]) & (2**L - 1)
        s[:, n] = state
    np.testing.assert_array_equal(states_of(trellis, jnp.asarray(u, jnp.int32)), s)
    np.testing.assert_array_equal(inputs_of(trellis, jnp.asarray(s, jnp.int32)), u)
    number = [sum(int(v) << int(b) for v, b in zip(row[::-1], offsets(widths, N))) for row in u]
    size = sum(widths) * N // len(widths) // 8
    stream = np.array([list(x.to_bytes(size, "little")) for x in number], np.uint8)
    steps = np.array([0, 1, 7, 30, N - 2, N - 1])
    np.testing.assert_array_equal(states_at(trellis, jnp.asarray(stream), jnp.asarray(steps), N), s[:, steps])


def offsets(widths: tuple[int, ...], N: int) -> np.ndarray:
    """First bit of each step, the last step's first."""
    return np.cumsum([0, *(widths[n % len(widths)] for n in reversed(range(N)))])[:-1]


def test_memory_is_bounded():
    for K in (1, 2, 8):
        batch = batch_of(Trellis(16, (K,)), 256, memory=2**26)
        assert 1 <= batch <= 64 and (batch == 1 or batch * 256 * 2 ** (16 - K) <= 2**26)
    assert batch_of(Trellis(20, (1,)), 256, memory=1) == 1
