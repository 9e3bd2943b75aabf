"""Puts the repository and the other folders of tests/ on sys.path, for scripts that are started by hand."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / name) for name in ("golden", "ranks", "bench"))]
