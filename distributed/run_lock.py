"""One run in an output folder at a time: a lock file that names the run, and that a dead run cannot keep.

    lock = RunLock.take(folder)      # UserError that names the other run; a line if a stale lock is taken over
    lock.check()                     # before anything is committed: UserError if another run has taken it meanwhile
    lock.release()                   # also at exit

The file holds host, process, time of start and the process's own start time, so that a process number that was given to
another program is noticed. A thread touches it every 20 seconds. On the same machine a lock is stale when its process
is gone. On another machine a process cannot be seen, so it is stale when it was not touched for five minutes by the
file server's clock.
"""

import atexit
import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from formats.files import UserError

LOCK = ".run_lock"

TOUCH_SECONDS = 20.0

STALE_SECONDS = 300.0  # without a touch, seen from another machine

UNREADABLE_SECONDS = 10.0  # a lock file without content is being written, or its writer was killed


class RunLock:
    """The lock of one folder, held by this process until release()."""

    held: dict[Path, "RunLock"] = {}  # of this process

    def __init__(self, path: Path):
        self.path, self.released = path, threading.Event()
        self.owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": datetime.datetime.now().isoformat(" ", "seconds"),
            "id": uuid.uuid4().hex,
        }

    @classmethod
    def take(cls, folder: str | Path) -> "RunLock":
        """Lock a folder, which is made if it is not there; once more in the same process is the same lock."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / LOCK
        if path in cls.held and cls.held[path]._is_own():
            return cls.held[path]
        lock = cls(path)
        for _ in range(10):
            if lock._create():
                break
            lock._remove_stale()
        else:
            raise UserError(f"output_dir: {folder}: {LOCK} cannot be made; other runs take it again and again")
        cls.held[path] = lock
        threading.Thread(target=lock._touch, name="run lock", daemon=True).start()
        atexit.register(lock.release)
        return lock

    def check(self) -> None:
        """UserError if the file is no longer this run's."""
        if not self._is_own():
            other = _read(self.path)
            raise UserError(
                f"output_dir: {self.path.parent}: "
                + (f"another run has taken it over: {_name(other)}" if other else f"{LOCK} of this run was removed")
                + "; this run ends, checkpoints are intact"
            )

    def release(self) -> None:
        self.released.set()
        if self.held.get(self.path) is self:
            del self.held[self.path]
            with contextlib.suppress(OSError):
                if self._is_own():
                    self.path.unlink()

    def _create(self) -> bool:
        """Make the file with its content, in one step; False if there is one."""
        temporary = self.path.with_name(f"{LOCK}.{self.owner['id']}.tmp")
        try:
            temporary.write_text(json.dumps(self.owner))
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except PermissionError:  # a file system without hard links
            return self._create_exclusively()
        except OSError as error:
            if error.errno in (1, 38, 95):  # EPERM, ENOSYS, EOPNOTSUPP: the same
                return self._create_exclusively()
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_exclusively(self) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(json.dumps(self.owner))
        except FileExistsError:
            return False
        return True

    def _remove_stale(self) -> None:
        """Remove another run's lock if that run is dead; else UserError. One run at a time reads, decides and removes:
        otherwise a slow one would remove the new lock of a faster one."""
        with _exclusively(self.path.parent):
            other = _read(self.path)
            if other is None and not self.path.exists():
                return
            age = self._age()
            reason = _stale(other, age)
            if reason is None:
                seen = f"last sign of life {age:.0f} s ago"
                raise UserError(
                    f"output_dir: {self.path.parent}: {_name(other)} is writing there ({seen}); stop it, or choose "
                    "another output_dir"
                )
            self.path.unlink(missing_ok=True)
            print(f"output_dir: the lock of {_name(other)} is taken over: {reason}", flush=True)

    def _age(self) -> float:
        """Seconds since the file was touched, by the file server's clock."""
        probe = self.path.with_name(f"{LOCK}.{self.owner['id']}.now")
        try:
            probe.touch()
            return max(0.0, probe.stat().st_mtime - self.path.stat().st_mtime)
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        found = _read(self.path)
        return found is not None and found.get("id") == self.owner["id"]

    def _touch(self) -> None:
        while not self.released.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):  # check() notices
                if self._is_own():
                    os.utime(self.path)


@contextlib.contextmanager
def _exclusively(folder: Path) -> Iterator[None]:
    """One process of this machine at a time in here, and none after the death of one; nothing on file systems that
    cannot lock a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _stale(owner: dict | None, age: float) -> str | None:
    """Why a lock is nobody's any more; None: its run may be alive."""
    if owner is None:
        return "it is empty" if age > UNREADABLE_SECONDS else None
    if owner.get("host") != socket.gethostname():
        return f"no sign of life for {age:.0f} s" if age > STALE_SECONDS else None
    start = _process_start(owner.get("pid"))
    if start is None:
        return "its process is gone"
    return None if start == owner.get("process_start") else "its process is gone, its number is another program's"


def _process_start(pid: object) -> str | None:
    """When a process of this machine was started, in ticks since boot; None: there is no such process."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self").exists() else _alive(pid)
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _alive(pid: object) -> str | None:
    """ "alive", where there is no /proc."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return None
    except PermissionError:
        pass
    return "alive"


def _name(owner: dict | None) -> str:
    if owner is None:
        return "another run"
    return f"the run of process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')},"
