import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.linalg.block_ldl import block_ldl, damped

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, 24)) @ RNG.standard_normal((24, 24))
H = X.T @ X


@pytest.mark.parametrize("block", [1, 4, 8, 24])
@pytest.mark.parametrize("upper", [False, True])
def test_factors(block, upper):
    L, D = block_ldl(H, block, upper)
    K = 24 // block
    full = np.zeros_like(H)
    for k in range(K):
        at = slice(k * block, (k + 1) * block)
        full[at, at] = D[k]
        np.testing.assert_allclose(L[at, at], np.eye(block), atol=1e-12)
        np.testing.assert_array_equal(L[at, at.stop :] if not upper else L[at, : at.start], 0.0)
    np.testing.assert_allclose(L @ full @ L.T, H, rtol=1e-10, atol=1e-8)
    # The loss identity: tr(d H d^T) = sum_k |eta_k D_k^(1/2)|^2 with eta = d L, for any error.
    d = RNG.standard_normal((5, 24))
    eta = (d @ L).reshape(5, K, block)
    assert np.einsum("okg,kgh,okh->", eta, D, eta) == pytest.approx(np.sum((d @ H) * d), rel=1e-10)


def test_damping_grows_where_there_is_no_factor():
    v = RNG.standard_normal((24, 2))
    singular = v @ v.T
    _, _, used = damped(singular, 4, 0.0)
    assert 0 < used <= 0.1
    assert damped(H, 4, 0.01)[2] == 0.01
    indefinite = H - 0.05 * np.trace(H) / 24 * np.eye(24)
    L, D, used = damped(indefinite, 1, 0.0)
    assert used >= 0.1 and (D > 0).all() and np.isfinite(L).all()
    assert (damped(np.zeros((4, 4)), 2, 0.01)[1] > 0).any()


def test_bad_input():
    with pytest.raises(InputError, match="Hessian of x.y, with damping 1: .*not positive definite"):
        damped(H - np.trace(H) * np.eye(24) * 2, 4, 0.01, "x.y")
    with pytest.raises(InputError, match=r"Hessian of x.y holds NaN"):
        damped(np.where(H > 5, np.nan, H), 4, 0.01, "x.y")
    with pytest.raises(InputError, match="blocks of 5 of a matrix of order 24"):
        block_ldl(H, 5)
    with pytest.raises(InputError, match="not positive definite"):
        block_ldl(-H, 4)
    with pytest.raises(InputError, match=r"shape \[3, 4\]"):
        block_ldl(np.ones((3, 4)), 1)
