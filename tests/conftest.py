"""Settings that must be made before jax is imported; and what a process that ran a thousand tests gives back."""

import itertools
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # results are compared bit for bit; a GPU run asks for itself
RUN = itertools.count(1)


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Every test compiles programs of its own; a process cannot hold those of all (see `lowbit.xla.release`)."""
    yield
    if next(RUN) % 16 == 0:
        from lowbit import xla

        xla.release()
