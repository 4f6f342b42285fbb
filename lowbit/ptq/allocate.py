"""The multiple-choice knapsack: one choice for each item, least cost, sizes within a budget.

`allocate` is exact wherever its frontier fits into memory, which for a model's tensors it does: layers repeat their
shapes, so that few different sums of bytes exist. A Lagrangian bound prunes it (Sinha & Zoltners, "The multiple-choice
knapsack problem", 1979), and tells how far the answer can be from the best where it does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowbit.errors import InputError

MOST_STATES = 1_000_000


class Allocation(NamedTuple):
    """`choice[i]` of item i; `size` is within the budget; no allocation costs less than `bound`."""

    choice: tuple[int, ...]
    cost: float
    size: int
    bound: float
    exact: bool


def allocate(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, states: int = MOST_STATES
) -> Allocation:
    """One of `costs[i]` for each item i, of least sum, with the sum of their `sizes` (whole numbers) at most `budget`.

    Exact up to `states` partial sums that are neither dominated nor excluded by the bound; beyond, the best found by
    the Lagrangian relaxation and exchanges, with its bound (`exact` is then whether both agree). Raises `InputError`
    for a budget below the smallest possible size, and costs that are not finite.
    """
    cost = [np.asarray(c, np.float64) for c in costs]
    size = [np.asarray(s, np.int64) for s in sizes]
    for i, (c, s) in enumerate(zip(cost, size, strict=True)):
        if not len(c) or len(c) != len(s):
            raise InputError(f"item {i} has {len(c)} costs and {len(s)} sizes (allowed: as many, at least one)")
        if not np.isfinite(c).all():
            raise InputError(f"item {i} has cost {c[~np.isfinite(c)][0]} (allowed: finite costs)")
    least = sum(int(s.min()) for s in size)
    if least > budget:
        raise InputError(f"budget of {budget} bytes (allowed: at least {least}, the smallest choice of each)")
    price, found = _relaxed(cost, size, budget)
    found = _improved(found, cost, size, budget)
    best = _total(found, cost)
    bound = _dual(price, cost, size, budget)
    choice, exact = _search(cost, size, budget, price, found, best, states)
    total = _total(choice, cost)
    return Allocation(
        tuple(choice), total, int(_total(choice, size)), total if exact else min(bound, total), exact or bound >= total
    )


def _total(choice: Sequence[int], values: Sequence[np.ndarray]) -> float:
    return float(sum(v[k] for k, v in zip(choice, values)))


def _dual(price: float, cost: Sequence[np.ndarray], size: Sequence[np.ndarray], budget: int) -> float:
    """A lower bound of the cost of every allocation within the budget, for any price of a byte."""
    return float(sum((c + price * s).min() for c, s in zip(cost, size)) - price * budget)


def _at(price: float, cost: Sequence[np.ndarray], size: Sequence[np.ndarray]) -> list[int]:
    """The best choice of each item at a price of a byte, the smaller of equals."""
    return [int(np.lexsort((s, c + price * s))[0]) for c, s in zip(cost, size)]


def _relaxed(cost: Sequence[np.ndarray], size: Sequence[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """The least price at which the choices fit (to bisection's accuracy), which maximizes the bound, and they."""
    choice = _at(0.0, cost, size)
    if _total(choice, size) <= budget:
        return 0.0, choice
    low, high = 0.0, 1.0
    spread = max(float(np.ptp(c)) for c in cost) or 1.0
    while _total(_at(high * spread, cost, size), size) > budget:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(_at(middle * spread, cost, size), size) <= budget else (middle, high)
    return high * spread, _at(high * spread, cost, size)


def _improved(choice: list[int], cost: Sequence[np.ndarray], size: Sequence[np.ndarray], budget: int) -> list[int]:
    """Spends what is left: the exchange of one item's choice that saves most a byte, while any fits."""
    choice, left = list(choice), budget - int(_total(choice, size))
    while True:
        best: tuple[float, int, int] | None = None
        for i, (c, s) in enumerate(zip(cost, size)):
            gain, more = c[choice[i]] - c, s - s[choice[i]]
            for k in np.flatnonzero((gain > 0) & (more <= left)):
                rate = float(gain[k]) / max(float(more[k]), 1e-9)
                if best is None or rate > best[0]:
                    best = (rate, i, int(k))
        if best is None:
            return choice
        _, i, k = best
        left -= int(size[i][k] - size[i][choice[i]])
        choice[i] = k


def _search(
    cost: Sequence[np.ndarray],
    size: Sequence[np.ndarray],
    budget: int,
    price: float,
    found: list[int],
    best: float,
    states: int,
) -> tuple[list[int], bool]:
    """Partial sums item by item, those dominated or beyond the bound dropped: `(the best choice, whether proven)`."""
    after = np.cumsum([0.0, *[(c + price * s).min() for c, s in zip(cost[::-1], size[::-1])]])[::-1]
    smallest = np.cumsum([0, *[int(s.min()) for s in size[::-1]]])[::-1]
    total, spent = np.zeros(1), np.zeros(1, np.int64)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    slack = 1e-12 * max(1.0, abs(best))
    for i, (c, s) in enumerate(zip(cost, size)):
        new_total, new_spent = (total[:, None] + c).ravel(), (spent[:, None] + s).ravel()
        keep = new_spent + smallest[i + 1] <= budget
        keep &= new_total + after[i + 1] - price * (budget - new_spent) <= best + slack
        at = np.flatnonzero(keep)
        at = at[np.lexsort((new_total[at], new_spent[at]))]
        lowest = np.minimum.accumulate(new_total[at]) if len(at) else new_total[at]
        at = at[np.concatenate([[True], lowest[1:] < lowest[:-1]])] if len(at) else at
        if len(at) > states or not len(at):
            return found, not len(at)  # without a state left, nothing is better than what was found
        steps.append((at // len(c), at % len(c)))
        total, spent = new_total[at], new_spent[at]
    end, choice = int(np.argmin(total)), []
    if total[end] >= best:
        return found, True
    for parent, own in reversed(steps):
        choice.append(int(own[end]))
        end = int(parent[end])
    return choice[::-1], True
