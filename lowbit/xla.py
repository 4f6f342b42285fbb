"""XLA flags that correctness needs, set before the backend starts; and memory that it leaves behind.

XLA:CPU in jaxlib 0.10 and 0.11 miscompiles reductions over int8 arithmetic that its YNNPACK fusion takes
(`sum(x * (a.astype(int8) - 8) + x * (b.astype(int8) - 8))` is wrong by 1e3 and changes from run to run). Without that
fusion results are right, and training steps take the same time within noise.
"""

import contextlib
import ctypes
import importlib.metadata
import os
from pathlib import Path

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
    """Gives back what this process holds for no one: free memory that glibc kept from XLA's temporary buffers (a walk
    through many blocks would grow by it), and, where the system's limit of memory mappings is near, all compiled
    programs (each takes several; at the limit, 65,530 on Linux, XLA crashes instead of raising). For between blocks,
    rows of a sweep, or tests."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # no /proc: no such limit
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        if Path("/proc/self/maps").read_bytes().count(b"\n") > limit // 3:
            import jax

            jax.clear_caches()
