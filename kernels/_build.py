"""Compiles the operators of a back end on first use, and caches them outside the tree.

The cache is a folder under $XDG_CACHE_HOME or ~/.cache, named by a hash of sources, flags, compiler and Paddle's
version. If several processes start at once, one builds; the others wait for its lock and load the result.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import paddle


def attempt(load: Callable) -> bool | str:
    """True after load(), or one line that says why it failed; catches the exceptions of a failed build."""
    try:
        load()
        return True
    except (OSError, RuntimeError, ImportError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def load(name: str, folder: str | Path, suffix: str, compiler: str, language: str, announce: str, **flags) -> None:
    """Load the operators of folder/*suffix from the cache, or build them into it.

    announce: printed before a build. flags: arguments of cpp_extension.load. Raises OSError if there is no compiler or
    the build fails.
    """
    import fcntl  # not on every system

    sources = sorted(Path(folder).iterdir())
    digest = hashlib.sha256(" ".join([paddle.__version__, sys.version, compiler, repr(sorted(flags.items()))]).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle-llm-kernels"
    built = cache / digest.hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{built.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.is_dir():
            if shutil.which(compiler) is None:
                raise OSError(f"no {language} compiler: there is no {compiler}")
            print(f"kernels: {announce}, once …", flush=True)
            for half_done in cache.glob(f"{built.name}.*.building"):  # left by a process that failed or was killed
                shutil.rmtree(half_done, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=f"{built.name}.", suffix=".building", dir=cache))
            _build(name, [str(s) for s in sources if s.suffix == suffix], building, language, flags)
            building.rename(
                built
            )  # a new folder name per build: the compiler of a killed process cannot write into ours
            return  # the build has loaded it
    paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(built / name / f"{name}.so"))


def _build(name, sources, folder, language, flags):
    """Compile into folder/name/name.so; the output of the compiler and of Paddle goes to folder/build.log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(folder / "build.log", "w") as log:
        saved = [os.dup(1), os.dup(2)]
        for stream in (1, 2):  # file descriptors, because the compiler is another process
            os.dup2(log.fileno(), stream)
        try:
            paddle.utils.cpp_extension.load(name=name, sources=sources, build_directory=str(folder), **flags)
        except (RuntimeError, OSError) as error:
            raise OSError(f"building the {language} ops failed, see {folder / 'build.log'}") from error
        finally:
            for stream, before in zip((1, 2), saved):
                os.dup2(before, stream)
                os.close(before)
