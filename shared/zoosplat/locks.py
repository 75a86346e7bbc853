"""Locks that processes of any machine can hold: a file that is locked, or on S3 an object that is renewed."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from zoosplat import stores
from zoosplat.errors import UserError

# A lock on S3 whose holder has not renewed it for so long is taken over.
LEASE_S = 10
RENEW_S = 2
POLL_S = 0.5


@contextmanager
def locked(url: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of this name while no other process does, of any machine; `waiting` is called twice a second.

    A file that is locked, or on S3 an object that exists. The lock of a process that was killed is free at once, on S3
    after LEASE_S unless it ran on this machine. It guards against work done twice: a holder that cannot renew its
    object for LEASE_S while others can read it loses it without noticing.
    """
    lock = _Lease(url) if stores.is_s3(url) else _FileLock(url)
    while not lock.take():
        waiting()
        time.sleep(POLL_S)
    try:
        yield
    finally:
        lock.release()


class _FileLock:
    def __init__(self, url: str) -> None:
        self._path = Path(url)
        self._file = -1

    def take(self) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self._path).st_ino == os.fstat(self._file).st_ino:
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return True  # a file system without locks
            raise
        os.close(self._file)  # held, or removed by the one that held it
        return False

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._file)


class _Lease:
    def __init__(self, url: str) -> None:
        self._url = url
        self._token = f"{_machine()} {os.getpid()} {uuid.uuid4().hex}"
        self._renewals = 0
        self._etag = ""
        self._seen = b""
        self._unchanged: float = 0
        self._looked: float = 0
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> bool:
        try:
            # In this order: what is put in its place is put in place of these bytes or not at all.
            etag = stores.etag(self._url)
            body = stores.read_bytes(self._url)
        except FileNotFoundError:
            taken = self._put(None)
        else:
            taken = self._is_ours(body) or (self._is_abandoned(body) and self._put(etag))
        if taken:
            self._keeper.start()
        return taken

    def release(self) -> None:
        self._released.set()
        self._keeper.join()
        with suppress(FileNotFoundError, UserError):  # without us it runs out
            if self._is_ours(stores.read_bytes(self._url)):
                stores.delete(self._url)

    def _is_ours(self, body: bytes) -> bool:
        """Also when it was put by a try whose answer was lost."""
        return body.startswith(self._token.encode())

    def _is_abandoned(self, body: bytes) -> bool:
        now = time.monotonic()
        # A look that took long was held up by the server, which then did not let the holder renew it either.
        self._unchanged = self._unchanged + min(now - self._looked, 2 * POLL_S) if body == self._seen else 0
        self._seen, self._looked = body, now
        machine, process = body.decode().split()[:2]
        return self._unchanged > LEASE_S or (machine == _machine() and not _is_alive(int(process)))

    def _put(self, etag: str | None) -> bool:
        put = stores.put_if(self._url, f"{self._token} {self._renewals}".encode(), etag)
        self._etag = put or self._etag
        return put is not None

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S):
            self._renewals += 1
            with suppress(Exception):
                if not self._put(self._etag):
                    return


@lru_cache(maxsize=1)
def _machine() -> str:
    """Names the processes whose numbers mean here what they mean there: a container's are its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Held:
    def check(self) -> None: ...


_locked = locked


@contextmanager
def locked(url, waiting):  # type: ignore
    with _locked(url, waiting):
        yield Held()


@contextmanager
def try_locked(url):  # type: ignore
    lock = _Lease(url) if stores.is_s3(url) else _FileLock(url)
    if not lock.take():
        yield None
        return
    try:
        yield Held()
    finally:
        lock.release()
