"""Lets these tests import the tiny model of the training tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
