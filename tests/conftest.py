"""ForwardContext by all tests: the repository root on sys.path, the `torch` and `slow` markers, --hf-python, small
fixtures.

python -m pytest tests                                          # everything that needs neither torch nor a GPU
python -m pytest tests --slow                                   # also what takes more than 20 seconds a test
python -m pytest tests --hf-python /path/to/venv/bin/python     # also what needs transformers and peft, run over there
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pool import Ranks

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # larger goldens, on the machine where the project is developed


def pytest_addoption(parser):
    parser.addoption(
        "--hf-python", default=None, help="a Python with torch, transformers and peft, for tests marked torch"
    )
    parser.addoption(
        "--chat-templates", default=None, help="a folder of published chat templates, for the test that renders them"
    )
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "torch: needs --hf-python, a Python with torch, transformers and peft")
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes more than 20 seconds; run with --slow"))


@pytest.fixture(scope="module")
def two():
    """Two processes that do jobs together, see ranks.py."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture
def hf_python(request, tmp_path):
    """Runs a script text over there, outside the repository, and returns the arrays that it saves as `arrays`."""
    python = request.config.getoption("--hf-python")
    if python is None:
        pytest.skip("needs --hf-python: a Python with torch, transformers and peft")

    def run(script, *args):
        out = tmp_path / "from_hf.npz"
        script = f"import sys\nimport numpy as np\n{script}\nnp.savez(sys.argv[1], **arrays)\n"
        done = subprocess.run(
            [python, "-c", script, str(out), *map(str, args)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(np.load(out))

    return run


@pytest.fixture
def run_python():
    """Runs a script text with this Python in a new process at the repository root; returns the JSON of its last
    line."""

    def run(script, *args, timeout=300):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(autouse=True)
def configured_kernels():
    """Configures before any product: MKL reads its instruction set at the first one, and without it bits differ from
    call to call. A test that computed in bfloat16 leaves float32 to the next."""
    kernels = sys.modules.get("kernels")
    if kernels is not None and not kernels._table:
        kernels.configure()
    yield
    if "kernels" in sys.modules:
        sys.modules["kernels"].bf16 = False


@pytest.fixture
def make_folder(tmp_path):
    """Writes a Hugging Face folder for a case of golden_weights.py; its weights as the goldens have them."""
    from golden_weights import CASES, draw, shapes

    import formats.tensor_files

    def make(case, dialect=0, change=None, config_change=None, name="hf"):
        folder = tmp_path / f"{name}_{case}_{dialect}"
        folder.mkdir(exist_ok=True)
        config = {**CASES[case][dialect], **(config_change or {})}
        tensors = draw(shapes(CASES[case][dialect]))
        if change:
            change(tensors)
        formats.tensor_files.write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
