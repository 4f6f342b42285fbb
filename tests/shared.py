"""Real data for tests: models and corpora that are not in the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def shared_path(rel: str) -> Path:
    """`rel` under the shared data (environment variable LOWBIT_SHARED, default `../shared`); skips if it is absent.
    In CI, where the folder is complete, a missing file is a wrong path, and fails."""
    root = Path(os.environ.get("LOWBIT_SHARED") or ROOT.parent / "shared")
    path = root / rel
    if not path.exists():
        if os.environ.get("CI") and root.is_dir():
            pytest.fail(f"{rel} is not in {root}")
        pytest.skip(f"{rel} is not at hand (set LOWBIT_SHARED to the folder that has it)")
    return path
