"""Real data for tests: models and corpora that are not in the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def shared_path(rel: str) -> Path:
    """`rel` under the shared data (environment variable LOWBIT_SHARED, default `../shared`); skips if it is absent."""
    path = Path(os.environ.get("LOWBIT_SHARED") or ROOT.parent / "shared") / rel
    if not path.exists():
        pytest.skip(f"{rel} is not at hand (set LOWBIT_SHARED to the folder that has it)")
    return path
