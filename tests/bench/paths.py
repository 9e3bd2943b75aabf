"""Puts the repository, tests/ and its folders on sys.path, for scripts that are started by hand."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), *(str(TESTS / name) for name in ("golden", "ranks", "bench"))]
