"""XLA flags that correctness needs, set before the backend starts; and memory that it leaves behind.

XLA:CPU in jaxlib 0.10 and 0.11 miscompiles reductions over int8 arithmetic that its YNNPACK fusion takes
(`sum(x * (a.astype(int8) - 8) + x * (b.astype(int8) - 8))` is wrong by 1e3 and changes from run to run). Without that
fusion results are right, and training steps take the same time within noise.
"""

import contextlib
import ctypes
import importlib.metadata
import os

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def flags(current: str, jaxlib: str) -> str:
    """`XLA_FLAGS` with the fusion of reductions off; what the user set stays, and other jaxlibs get nothing.

    An unknown flag aborts the process, so it is set only for the versions that are known to have it.
    """
    if FLAG in current or not jaxlib.startswith(("0.10.", "0.11.")):
        return current
    return f"{current} {FLAG}=-reduce".strip()


def configure() -> None:
    """Sets `XLA_FLAGS` of this process and its children; imports nothing heavy."""
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return
    os.environ["XLA_FLAGS"] = flags(os.environ.get("XLA_FLAGS", ""), version)


def release() -> None:
    """Gives memory that is free in this process back to the system, where the C library can (glibc keeps what XLA's
    temporary buffers leave, and a walk through many blocks would grow by it)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
