"""What a process gives back: see `lowbit.xla`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lowbit import xla


def mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here: no limit of mappings either")
def test_release_forgets_programs_near_the_limit_of_mappings(monkeypatch):
    double = jax.jit(lambda x: x + x)

    def compile_some():
        for n in range(1, 40):
            double(jnp.ones((3, n)))

    compile_some()
    before = double._cache_size()
    xla.release()
    assert double._cache_size() == before  # far from the limit: what is compiled stays
    read = Path.read_text
    low = str(mappings())
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: low if self.name == "max_map_count" else read(self, *a, **k)
    )
    xla.release()
    assert double._cache_size() == 0
    assert double(jnp.ones(2)).tolist() == [2, 2]
