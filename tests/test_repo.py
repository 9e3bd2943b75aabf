"""The budgets and rules of the house, read from the files: size, import order, environment, format, the loop, README.

    python -m pytest -q -s tests/test_repo.py          # -s prints the import order and the sizes

A budget is here to make us delete, not to make us squeeze.
"""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# docs/ARCHITECTURE.md: numbered lines; a room imports only from the lines above its own.
IMPORT_ORDER = re.findall(r"^ ?(\d+)  ([a-z_. ]+)$", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.M)
LEVELS = {room: int(number) for number, rooms in IMPORT_ORDER for room in rooms.split()}
SCRIPTS = ("pretrain", "finetune", "dpo", "reward", "rl", "quantize", "export", "serve")
MAX_ROOM_LINES, MAX_SCRIPT_LINES, MAX_QUANTIZE_LINES = 1000, 450, 900
MAX_FUNCTION_LINES, MAX_MAIN_LINES, MAX_COLUMNS, MAX_README_WORDS = 60, 130, 120, 1300


def git_files():
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("needs git and a clone")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def product_files():
    """Python files of the product: not the tests, not the scripts that make the demo."""
    return [name for name in git_files() if name.endswith(".py") and not name.startswith(("tests/", "demo/"))]


def room_of(name):
    """A file's module name; the files of kernels/ are one room."""
    return "kernels" if name.startswith("kernels/") else name.removesuffix(".py").replace("/", ".")


def imported_rooms(name):
    """The rooms that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        rooms |= {"kernels" if room.split(".")[0] == "kernels" else room for room in names}
    return {room for room in rooms if room in LEVELS and room != room_of(name)}


def test_rooms_import_only_from_lower_lines():
    upward = []
    for name in product_files():
        if name.endswith("__init__.py") and not name.startswith("kernels/"):
            continue
        room = room_of(name)
        assert room in LEVELS, f"{name} has no place in the import order"
        rooms = sorted(imported_rooms(name), key=lambda other: (LEVELS[other], other))
        print(f"{LEVELS[room]:2} {name}: {' '.join(rooms)}")
        upward += [f"{name} imports {other}" for other in rooms if LEVELS[other] >= LEVELS[room]]
    assert not upward, upward


def test_files_functions_and_lines_are_within_the_budget():
    too_long = []
    for name in [*product_files(), *(name for name in git_files() if re.match(r"demo/.*\.py$", name))]:
        text, room = (ROOT / name).read_text(), room_of(name)
        lines = text.splitlines()
        limit = MAX_QUANTIZE_LINES if room == "quantize" else MAX_SCRIPT_LINES if room in SCRIPTS else MAX_ROOM_LINES
        print(f"{len(lines):5} {name}")
        if len(lines) > limit:
            too_long.append(f"{name}: {len(lines)} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length, limit = node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES
                limit = MAX_MAIN_LINES if node.name == "main" else limit
                if length > limit:
                    too_long.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {limit}")
    for name in git_files():
        if name.endswith((".py", ".cc", ".h", ".cu", ".cuh")):
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if len(line) > MAX_COLUMNS:
                    too_long.append(f"{name}:{number}: {len(line)} columns, at most {MAX_COLUMNS}")
    assert not too_long, "\n".join(too_long)


def test_the_formatter_is_skipped_only_behind_tables():
    """`# fmt: skip` stands at the end of a table: a name at module level that gets a value of several lines."""
    wrong = []
    for name in git_files():
        if name.endswith(".py") and name != "tests/test_repo.py":
            text = (ROOT / name).read_text()
            assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign | ast.AnnAssign)]
            tables = {node.end_lineno for node in assignments if node.end_lineno > node.lineno}
            for number, line in enumerate(text.splitlines(), 1):
                if re.search(r"# fmt: (skip|off)", line) and number not in tables:
                    wrong.append(f"{name}:{number}")
    assert not wrong, wrong


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=lambda command: command[0])
def test_ruff(command):
    pytest.importorskip("ruff", reason="needs ruff: pip install -r requirements-dev.txt")
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_training_loop_is_the_same_in_every_script():
    def loop(name):
        pattern = r"^ *# =+ \d\. training loop.*?end of the training loop\n"
        return re.search(pattern, (ROOT / name).read_text(), re.M | re.S)[0]

    shared = loop("finetune.py")
    assert shared.count("\n") > 20
    assert all(loop(name) == shared for name in ("pretrain.py", "dpo.py", "reward.py"))
    own = loop("rl.py")  # it makes its own data: docs/ARCHITECTURE.md says why these lines differ
    batches = "batches = trainer.step_micro_batches(train, state.step, args, topology)"
    for line, instead in (
        ("batches = step_batches(state.step)", batches),
        ("forward_backward(policy, ", "forward_backward(model, "),
        ("            after_update(time.perf_counter() - start)\n", ""),
    ):
        assert own.count(line) == 1, line
        own = own.replace(line, instead)
    assert own == shared


def test_importing_a_script_does_nothing(run_python, tmp_path):
    script = """import json, os, sys
import paddle
def used(*args, **kwargs): raise AssertionError("importing used the device")
paddle.to_tensor = paddle.seed = paddle.set_device = paddle.device.set_device = used
os.chdir(sys.argv[1])
import dpo, export, finetune, pretrain, quantize, reward, rl, serve
print(json.dumps([os.listdir("."), "matplotlib" in sys.modules]))"""
    assert run_python(script, tmp_path) == [[], False]


def test_the_environment_is_read_in_two_places_only():
    """No os.environ outside kernels/ and the launcher's ranks: what a run does is in its arguments."""
    for name in product_files():
        if not name.startswith("kernels/") and name != "distributed/watchdog.py":
            lines = [
                node.lineno
                for node in ast.walk(ast.parse((ROOT / name).read_text()))
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            ]
            assert not lines, f"{name}:{lines}"


def test_public_functions_and_classes_have_types():
    """Parameters and results of what a room offers to others. The ops of a back end have the signatures of the shim."""
    shim = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    ops = {node.name for node in shim.body if isinstance(node, ast.FunctionDef)}
    untyped = []
    for name in product_files():
        is_back_end = name in ("kernels/reference.py", "kernels/cpu.py", "kernels/gpu.py")
        for node in ast.parse((ROOT / name).read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if is_back_end and node.name in ops:
                    continue
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(argument.annotation is None for argument in arguments):
                    untyped.append(f"{name}:{node.lineno} {node.name}")
    print("\n".join(untyped))
    assert not untyped, f"{len(untyped)} functions"


def test_readme_is_read_in_five_minutes():
    words = len((ROOT / "README.md").read_text().split())
    assert words <= MAX_README_WORDS, f"README.md has {words} words, at most {MAX_README_WORDS}"


def test_readme_commands_and_file_tree():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    assert [block.count("\n") for block in blocks[:2]] == [1, 1]
    assert "finetune.py configs/llama_lora.json" in blocks[0] and "pytest" in blocks[1]
    for block in blocks[:2]:
        assert all((ROOT / name).is_file() for name in re.findall(r"[\w/-]+\.(?:py|txt|json)\b", block)), block

    section = re.search(r"^## Files\n.*?^```\w*\n(.*?)^```", text, re.M | re.S)
    names = [re.fullmatch(r"(\S+) {2,}\S.*", line) for line in section[1].splitlines()]
    assert all(names), "each line: a name, two or more spaces, a comment"
    names, files = {name[1] for name in names}, git_files()
    for name in names:
        assert any(file.startswith(name) if name.endswith("/") else file == name for file in files), (
            f"{name} is not there"
        )
    unnamed = [
        file
        for file in files
        if file not in ("README.md", ".gitignore")
        and not any(file == name or name.endswith("/") and file.startswith(name) for name in names)
    ]
    assert not unnamed, f"the file tree does not name {unnamed}"


def test_no_merge_is_left_half_done():
    marked = []
    for name in git_files():
        if name.endswith((".md", ".py", ".cc", ".h", ".json", ".html", ".txt")):
            text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
            marked += [name] if re.search(r"^(<{7}|>{7}) ", text, re.M) else []
    assert not marked, marked


def test_links_between_documents_lead_somewhere():
    broken = []
    for name in [name for name in git_files() if name.endswith(".md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text()):
            if "://" not in target and not (ROOT / name).parent.joinpath(target).exists():
                broken.append(f"{name}: {target}")
    assert not broken, broken
