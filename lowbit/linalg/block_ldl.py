"""Block LDL^T of a positive definite matrix, in float64 on the host: `H = L D L^T`.

`L` is unit block triangular with blocks of g x g and `D` block diagonal. From the Cholesky factor, `H = C C^T`:
`L = C blockdiag(C_kk)^-1` and `D_k = C_kk C_kk^T`. With an error `D W = W - W_hat` and `eta = D W L`,

    tr(D W H D W^T) = sum_k |eta_k D_k^(1/2)|^2,

so a quantizer that rounds `W_k` plus what the errors of the blocks before it add to `eta_k` minimises one term after
the other: LDLQ (QuIP#, arXiv 2402.04396, section 4.1). Blocks go in the order of the columns if L is *upper* triangular
(the Cholesky factorization starts from the last column), which is GPTQ's order, and in the reverse order if it is
lower, as in the paper.
"""

import numpy as np
from jaxtyping import Float

from lowbit.errors import InputError

MOST_DAMPING = 1.0


def block_ldl(
    H_II: Float[np.ndarray, "_ _"], block: int, upper: bool = False
) -> tuple[Float[np.ndarray, "I I"], Float[np.ndarray, "K g g"]]:
    """`(L, D)` with blocks of `block` columns, float64; with `upper`, L is upper triangular.

    Raises `InputError` for a block that does not divide the order, for NaN, and where H is not positive definite.
    """
    H = np.asarray(H_II, np.float64)
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise InputError(f"LDL of a matrix of shape {list(H.shape)} (allowed: square)")
    n = len(H)
    if block < 1 or n % block:
        raise InputError(f"LDL in blocks of {block} of a matrix of order {n} (allowed: divisors of {n})")
    if not np.isfinite(H).all():
        raise InputError("LDL of a matrix that holds NaN or infinite values (allowed: finite ones)")
    try:
        C = np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1] if upper else np.linalg.cholesky(H)
    except np.linalg.LinAlgError as e:
        raise InputError("LDL of a matrix that is not positive definite (allowed: sums of x x^T, damped)") from e
    K = n // block
    C_kk = C.reshape(K, block, K, block)[np.arange(K), :, np.arange(K)]
    L = np.einsum("nkg,kgh->nkh", C.reshape(n, K, block), np.linalg.inv(C_kk)).reshape(n, n)
    return L, C_kk @ C_kk.swapaxes(1, 2)


def damped(
    H_II: Float[np.ndarray, "I I"], block: int, damping: float, name: str = "matrix", upper: bool = True
) -> tuple[Float[np.ndarray, "I I"], Float[np.ndarray, "K g g"], float]:
    """`(L, D, damping)` of H plus `damping` times the mean of its diagonal, ten times as much as often as there is no
    factor, up to 1.0. Where the diagonal is 0, its mean is added. Raises `InputError` with the name."""
    H = np.asarray(H_II, np.float64)
    diagonal = np.diagonal(H)
    if not np.isfinite(H).all():
        raise InputError(f"Hessian of {name} holds NaN or infinite values (allowed: finite ones)")
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while True:
        try:
            L, D = block_ldl(H + np.diag(np.where(live, 0.0, mean) + damping * mean), block, upper)
            return L, D, damping
        except InputError as e:
            if damping >= MOST_DAMPING or not isinstance(e.__cause__, np.linalg.LinAlgError):
                raise InputError(f"Hessian of {name}, with damping {damping:g}: {e}") from e
            damping = min(MOST_DAMPING, 10 * damping or 0.001)
