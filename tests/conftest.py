"""Shared by all tests: the `torch`, `sweep` and `slow` markers, --hf-python, small fixtures.

python -m pytest tests                                          # everything that needs neither torch nor a GPU
python -m pytest tests --sweeps                                 # every case of the long sweeps too, as CI does
python -m pytest tests --slow                                   # that, and what takes more than 20 seconds a test
python -m pytest tests --hf-python /path/to/venv/bin/python     # also what needs transformers and peft, run over there
"""

import json
import os
import subprocess
import sys
import zlib
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
    parser.addoption("--client-python", default=sys.executable, help="a Python with clients of the server, for theirs")
    parser.addoption("--llama-cpp-python", default=None, help="a Python with llama_cpp, for tests of GGUF files")
    parser.addoption(
        "--gptq-python", default=None, help="a Python with transformers, optimum, gptqmodel, sentencepiece"
    )
    parser.addoption("--vllm-python", default=None, help="a Python with vllm, for tests of exported integers")
    parser.addoption("--lm-eval-python", default=None, help="a Python with lm-eval and transformers: tests/clients")
    parser.addoption("--chat-model", default=None, help="the folder of a real chat model: tests/clients")
    parser.addoption(
        "--json-schema-suite",
        default=None,
        help="the folder tests of JSON-Schema-Test-Suite: test_structured_output.py",
    )
    parser.addoption("--sweeps", action="store_true", help="also run all cases of the tests marked sweep")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, and all cases of sweeps")


def pytest_configure(config):
    config.addinivalue_line("markers", "torch: needs --hf-python, a Python with torch, transformers and peft")
    config.addinivalue_line("markers", "sweep(keep): many cases of one check; the default run takes `keep` of them")
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")


def pytest_collection_modifyitems(config, items):
    slow = config.getoption("--slow")
    cases_of = {}
    for item in items:
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="takes more than 20 seconds; run with --slow"))
        elif marker := item.get_closest_marker("sweep"):
            cases_of.setdefault((item.parent.nodeid, item.originalname), []).append((item, marker.kwargs["keep"]))
    if slow or config.getoption("--sweeps") or any("::" in argument for argument in config.args):
        return  # a test that is asked for by name runs in full
    for (_, name), cases in cases_of.items():
        keep, offset = cases[0][1], zlib.crc32(name.encode())  # other tests keep other cases
        chosen = {(offset + i * len(cases) // keep) % len(cases) for i in range(keep)}
        for i, (item, _) in enumerate(cases):
            if i not in chosen:
                item.add_marker(pytest.mark.skip(reason="one of many cases; run with --sweeps"))


@pytest.fixture
def client_python(request):
    """Runs a script text with a client's Python: client_python(module, script, *arguments)."""
    python = request.config.getoption("--client-python")

    def run(name, script, *args):
        module = {"langchain": "langchain_openai"}.get(name, name)
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
            pytest.skip(f"needs --client-python: a Python with {name}")
        done = subprocess.run([python, "-c", script, *args], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


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
