"""The knapsack against every combination there is."""

import itertools

import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.ptq.allocate import allocate


def problem(seed: int) -> tuple[list[list[float]], list[list[int]], int]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, rng.integers(1, 7))
    costs = [np.round(rng.exponential(1, n), int(rng.integers(0, 9))).tolist() for n in counts]
    sizes = [rng.integers(0, 30, n).tolist() for n in counts]
    return costs, sizes, int(rng.integers(sum(map(min, sizes)), sum(map(max, sizes)) + 2))


def brute(costs, sizes, budget: int) -> float:
    every = itertools.product(*[range(len(c)) for c in costs])
    fit = (ks for ks in every if sum(s[k] for k, s in zip(ks, sizes)) <= budget)
    return min(sum(c[k] for k, c in zip(ks, costs)) for ks in fit)


def test_allocations_are_the_best():
    short = 0
    for seed in range(300):
        costs, sizes, budget = problem(seed)
        best = brute(costs, sizes, budget)
        got = allocate(costs, sizes, budget)
        assert got.exact and got.cost == pytest.approx(best, abs=1e-9) and got.bound == got.cost
        assert got.size == sum(s[k] for k, s in zip(got.choice, sizes)) <= budget
        assert got.cost == pytest.approx(sum(c[k] for k, c in zip(got.choice, costs)))
        rough = allocate(costs, sizes, budget, states=0)  # what is left without the search
        assert rough.size <= budget and rough.bound - 1e-9 <= best <= rough.cost + 1e-9
        short += rough.cost > best + 1e-9
    assert short > 0  # the search is needed


def test_a_large_model_is_exact_and_uses_its_budget():
    rng = np.random.default_rng(0)
    shapes = [1024 * 1024, 1024 * 4096] * 128
    sizes = [[n * b // 8 + 4 for b in (2, 3, 4)] for n in shapes]
    costs = [[a * e for e in (0.0915, 0.0292, 0.0079)] for a in rng.exponential(1, len(shapes))]
    budget = int(sum(n * 2.6 / 8 for n in shapes))
    got = allocate(costs, sizes, budget)
    assert got.exact and budget - 1024 * 1024 / 8 < got.size <= budget
    for i in range(0, len(shapes), 2):  # of two tensors of one shape, the one that costs more never gets less
        for j in range(0, len(shapes), 2):
            assert got.choice[i] <= got.choice[j] or costs[i][0] >= costs[j][0]


def test_bad_problems_are_refused():
    with pytest.raises(InputError, match=r"budget of 4 bytes \(allowed: at least 5, the smallest choice of each\)"):
        allocate([[1.0, 2.0], [1.0]], [[3, 2], [3]], 4)
    with pytest.raises(InputError, match=r"item 1 has cost nan"):
        allocate([[1.0], [float("nan")]], [[1], [1]], 4)
    with pytest.raises(InputError, match=r"item 0 has 2 costs and 1 sizes"):
        allocate([[1.0, 2.0]], [[1]], 4)
