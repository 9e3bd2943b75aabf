"""Building our own operators on first use, for every back end that has some: compiled once, kept outside the tree.

The cache is a folder named after the sources, the flags, the compiler and Paddle's version, under $XDG_CACHE_HOME or
~/.cache. Several processes that start at once build once: the others wait at a lock and load what it made.
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
    """True once load() has run, or in one line why it could not; the exceptions are those that a build can end in."""
    try:
        load()
        return True
    except (OSError, RuntimeError, ImportError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def load(name: str, folder: str | Path, suffix: str, compiler: str, language: str, announce: str, **flags) -> None:
    """Load the operators of folder/*suffix from the cache, or build them into it with flags, cpp_extension.load's own.

    announce is printed before a build. Raises OSError if there is no compiler or the build fails.
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
            for half_done in cache.glob(f"{built.name}.*.building"):  # whoever made it was killed, or failed
                shutil.rmtree(half_done, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=f"{built.name}.", suffix=".building", dir=cache))
            _build(name, [str(s) for s in sources if s.suffix == suffix], building, language, flags)
            building.rename(built)  # a new name each time: a compiler that outlived its killed parent harms nobody
            return  # building has loaded it
    paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(built / name / f"{name}.so"))


def _build(name, sources, folder, language, flags):
    """Compile into folder/name/name.so; what the compiler and Paddle say goes to folder/build.log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(folder / "build.log", "w") as log:
        saved_streams = [os.dup(1), os.dup(2)]
        for stream in (1, 2):  # not only Python's: a process of its own compiles
            os.dup2(log.fileno(), stream)
        try:
            paddle.utils.cpp_extension.load(name=name, sources=sources, build_directory=str(folder), **flags)
        except (RuntimeError, OSError) as error:
            raise OSError(f"building the {language} ops failed, see {folder / 'build.log'}") from error
        finally:
            for stream, before in zip((1, 2), saved_streams):
                os.dup2(before, stream)
                os.close(before)
