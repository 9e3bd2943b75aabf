"""Files read with a message that names them, and written whole: UserError, atomic_file."""

import contextlib
import errno
import json
import os
import zlib
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path, mode="w", sync=True):
    """A file that is complete or not there: written under a temporary name, synced, renamed."""
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


def _json_object(path):
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(found).__name__}")
    return found


def crc32_of(path):
    """Of a file's bytes; None if it cannot be read."""
    found, block = 0, bytearray(4 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                found = zlib.crc32(memoryview(block)[:size], found)
    except OSError:
        return None
    return found


class UserError(ValueError):
    """Something the user can put right: one line that says where, what was found and what would be right."""


def read_json(path):
    """JSON file -> object. UserError with file:line when it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON in UTF-8: {error}") from None


def read_text(path):
    """File -> str, as it is. UserError when it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None


def parse_json_line(line, path, number):
    """One line (bytes) of a JSON-lines file -> dict, or a UserError that names file:line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:40].decode("utf-8", "replace").strip()
        raise UserError(f"{path}:{number}: not a JSON object on one line: {error}; found {shown!r}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: a JSON object is wanted on each line, found {brief(record)}")
    return record


def brief(value):
    """A JSON value in at most 60 characters, for a message."""
    return json.dumps(value, ensure_ascii=False)[:60]


def names_in(folder):
    """A few file names, for a message."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def _disk_full(error):
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync(path):
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
