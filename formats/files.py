"""Files read with messages that name them, and written so that they are complete or not there.

    with atomic_file(path) as file:
        json.dump(values, file)
    config = read_json(path)                   # UserError "PATH:LINE: not JSON: …" if it is not
    raise UserError(f"{path}: what was found; what would be right")

UserError is what every room raises for a mistake that the user can mend: trainer.run_script prints it as one line.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w", sync: bool = True) -> Iterator[IO]:
    """A file that is complete or not there: written under a temporary name, synced to the disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json_object(path: Path) -> dict:
    """JSON file -> dict; UserError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def crc32_of(path: str | Path) -> int | None:
    """CRC-32 of a file's bytes; None if it cannot be read."""
    checksum, block = 0, bytearray(4 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                checksum = zlib.crc32(memoryview(block)[:size], checksum)
    except OSError:
        return None
    return checksum


SAMPLED_BYTES, SAMPLES = 64 << 20, 1024  # of a file for fingerprint(), evenly spread; a smaller file is read whole


def fingerprint(path: str | Path) -> list:
    """[size, hash of the bytes] of a file; above 64 MB, of 1,024 blocks of it from first to last."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        block = SAMPLED_BYTES // SAMPLES
        starts = [0] if size <= SAMPLED_BYTES else [i * (size - block) // (SAMPLES - 1) for i in range(SAMPLES)]
        for start in starts:
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES if size <= SAMPLED_BYTES else block))
    return [size, digest.hexdigest()]


class UserError(ValueError):
    """A mistake that the user can mend, in one line: where it is, what was found, what would be right."""


def refuse_lfs_pointer(path: str | Path) -> None:
    """UserError for the three lines of text that git leaves in place of a large file where git-lfs did not run."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        folder = Path(path).parent
        raise UserError(f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` in {folder}")


def read_json(path: str | Path) -> object:
    """JSON file -> value. UserError with file:line when it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8: {error}") from None


def read_text(path: str | Path) -> str:
    """File -> str, unchanged. UserError when it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None


def parse_json_line(line: bytes, path: str | Path, number: int) -> dict:
    """One line (bytes) of a JSON-lines file -> dict, or a UserError that names file:line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:40].decode("utf-8", "replace").strip()
        if isinstance(error, json.JSONDecodeError) and shown == "{":
            error = "it goes on in the next lines; write each record on one line, or all in one array [{…}, {…}]"
        raise UserError(f"{path}:{number}: not a JSON object on one line: {error}; found {shown!r}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: a JSON object is expected on each line, found {brief(record)}")
    return record


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Printing stops without a traceback when its reader does, as in `… | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process


def brief(value: object) -> str:
    """A JSON value in at most 60 characters, for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # nested too deep, or a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text[:60].encode("utf-8", "backslashreplace").decode()


def names_in(folder: Path) -> str:
    """A few file names, for a message."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def _disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


WRITE_ERRORS = {  # errno: (what it says, what would help)
    errno.ENOSPC: ("the disk is full", "free some space, then resume"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then resume"),
    errno.EROFS: ("the file system is read-only now", "make it writable again, then resume"),
    errno.EIO: ("the disk reports an input/output error", "see to it, then resume"),
    errno.ESTALE: ("the file server has lost the folder", "mount it again, then resume"),
    errno.ENOTCONN: ("the file server is gone", "mount it again, then resume"),
}


def write_error(error: BaseException, folder: str | Path) -> str | None:
    """One line for an error of the disk below a file or `folder`, which the user can mend; None: another error."""
    if not isinstance(error, OSError) or error.errno not in WRITE_ERRORS or not (error.filename or _disk_full(error)):
        return None
    what, remedy = WRITE_ERRORS[error.errno]
    return f"{error.filename or folder}: {what}; {remedy}"


def _sync(path: str | Path) -> None:
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
