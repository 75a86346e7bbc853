"""Locks that processes of any machine can hold: a file that is locked, or on S3 an object that is renewed.

A lock prevents work from being done twice. A process that cannot renew its object on S3 for LEASE_S, because it was
stopped or cut off from the server, loses the lock to a process that waits for it. `Held` tells it so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from zoosplat.errors import LockLost
from zoosplat.storage import conditional, objects, urls

# Time in s without a renewal after which a lock on S3 is taken over.
LEASE_S = 10
# Time in s between two renewals.
RENEW_S = 2
# Time in s that is added to LEASE_S before a lock counts as free. It covers a renewal that is under way and the
# resolution of an object's time, which is 1 s.
MARGIN_S = 3
# Time in s between two attempts to take a lock.
POLL_S = 0.5
# Longest time in s for which taking a lock waits for processes that only look whether it is held.
LOOKED_AT_S = 1.0


class Held(ABC):
    """A lock that this process holds, or has held until another one took it over."""

    @property
    @abstractmethod
    def lost(self) -> bool:
        """Whether another process is known to have taken it over. It costs no request."""

    @abstractmethod
    def check(self) -> None:
        """Raise unless the lock is held. Callers ask before they write what another holder may be writing too.

        It rarely costs a request.

        Raises:
            LockLost: another process has taken the lock over.
            Unreachable: the lock could not be renewed for longer than it lasts, and the server still does not answer.
        """


@contextmanager
def locked(url: str, waiting: Callable[[], None]) -> Iterator[Held]:
    """Hold the lock of this name, once no other process of any machine holds it.

    The lock of a process that was killed is free at once; on S3 after LEASE_S, unless the process ran on this machine.

    Args:
        url: a file that is locked, or on S3 an object that exists while the lock is held.
        waiting: called twice a second while another process holds the lock.
    """
    lock = _lock(url)
    try:
        while not lock.take():
            waiting()
            time.sleep(POLL_S)
        yield lock
    finally:
        lock.release()


@contextmanager
def try_locked(url: str) -> Iterator[Held | None]:
    """As `locked`, but yield None at once where another process holds the lock.

    On S3 a process that was killed on another machine counts as a holder, however long ago that was. Only `locked` can
    take its lock over.
    """
    lock = _lock(url)
    try:
        yield lock if lock.take() else None
    finally:
        lock.release()


def is_held(url: str) -> bool:
    """Whether a process of any machine holds the lock of this name now. Nothing is taken, made or removed.

    On S3 a lock counts as held until LEASE_S + MARGIN_S after its last renewal. On a file system without locks it never
    counts as held.
    """
    return _lease_is_held(url) if urls.is_s3(url) else _file_is_held(url)


def _lock(url: str) -> _Lease | _FileLock:
    return _Lease(url) if urls.is_s3(url) else _FileLock(url)


# -- files --------------------------------------------------------------------------------------------------------
# Error numbers of a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class _FileLock(Held):
    def __init__(self, url: str) -> None:
        self._path = Path(url)
        self._file = -1

    def take(self) -> bool:
        os.makedirs(os.path.realpath(self._path.parent), exist_ok=True)
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            return False  # The last holder has removed the folder meanwhile.
        if self._is_locked() and not self.lost:
            return True
        os.close(self._file)  # Another process holds the file, or the last holder has removed it.
        self._file = -1
        return False

    def _is_locked(self) -> bool:
        """Try to lock the file, and return whether it is locked.

        Where only a shared lock is granted, the other locks are shared too. They belong to processes that only look.
        """
        deadline = time.monotonic() + LOOKED_AT_S
        while not self._flock(fcntl.LOCK_EX):
            if not self._flock(fcntl.LOCK_SH) or time.monotonic() > deadline:
                return False
            # Two processes that want the lock may see each other's shared locks. Random times resolve this.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            time.sleep(random.uniform(0, 0.002))
        return True

    def _flock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def release(self) -> None:
        if self._file < 0:
            return
        if not self.lost:
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1

    @property
    def lost(self) -> bool:
        """Whether the file was removed, so that other processes lock a new one."""
        try:
            there, ours = os.stat(self._path), os.fstat(self._file)
        except FileNotFoundError:
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def check(self) -> None:
        if self.lost:
            raise LockLost(f"{self._path}: was removed while this run was at work; run again, finished work is kept")


def _file_is_held(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(file)
    return False


# -- objects on S3 ------------------------------------------------------------------------------------------------
# A clock that goes on while the machine is suspended, where the system has one.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class _Lease(Held):
    """An object on S3 that holds its owner's token. It is put with conditions only, so two owners never both put it.

    The answer to a put may be lost although the object was put. After every put without success the object is therefore
    read, and if it holds the own token, the lock is held.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = f"{_machine()} {os.getpid()} {uuid.uuid4().hex}"
        self._renewals = 0
        self._etag = ""
        self._confirmed: float = 0  # Time at which the last put that arrived was sent.
        self._lost = False
        self._seen = b""
        self._unchanged: float = 0
        self._looked: float = 0
        self._one_at_a_time = threading.Lock()
        self._released = threading.Event()
        self._keeper: threading.Thread | None = None

    def take(self) -> bool:
        try:
            # The ETag is read first, so that a put replaces the bytes that are read here or does nothing.
            etag = conditional.etag(self._url)
            body = objects.read_bytes(self._url)
        except FileNotFoundError:
            taken = self._put(None)
        else:
            taken = self._is_abandoned(body) and self._put(etag)
        if taken:
            self._keeper = threading.Thread(target=self._keep, name=f"keeper of {self._url}", daemon=True)
            self._keeper.start()
        return taken

    def release(self) -> None:
        if self._keeper is None:
            return
        self._released.set()
        self._keeper.join()
        self._keeper = None
        with suppress(Exception):  # A lease that is not removed runs out.
            # The renewal makes the lease last until the request that removes it has been answered.
            if not self._lost and self._put(self._etag):
                conditional.delete_if(self._url, self._etag)

    @property
    def lost(self) -> bool:
        return self._lost

    def check(self) -> None:
        if not self._lost and time.clock_gettime(_CLOCK) - self._confirmed > LEASE_S:
            self._renew()
        if self._lost:
            raise LockLost(f"{self._url}: another run has taken this work over; run again, finished work is kept")

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S) and not self._lost:
            with suppress(Exception):  # The next attempt may succeed, even after LEASE_S.
                self._renew()

    def _renew(self) -> None:
        with self._one_at_a_time:
            if not self._put(self._etag):
                self._lost = True

    def _put(self, etag: str | None) -> bool:
        """Put the object in place of the one with this ETag, or of none with None. Return whether it is ours now."""
        sent = time.clock_gettime(_CLOCK)
        self._renewals += 1
        body = f"{self._token} {self._renewals}".encode()
        try:
            put = conditional.put_if(self._url, body, etag)
        except Exception:
            there = self._find_ours()
            if there is None:
                raise
        else:
            there = body if put is not None else self._find_ours()
            self._etag = put or self._etag
        if there == body:
            self._confirmed = sent
        return there is not None

    def _find_ours(self) -> bytes | None:
        """The object's content if it holds our token, whose ETag is noted; else None."""
        try:
            etag = conditional.etag(self._url)
            body = objects.read_bytes(self._url)
        except FileNotFoundError:
            return None
        if not body.startswith(self._token.encode()):
            return None
        self._etag = etag
        return body

    def _is_abandoned(self, body: bytes) -> bool:
        now = time.monotonic()
        # A look that took long was held up by the server, which may have held up the holder's renewal as well.
        self._unchanged = self._unchanged + min(now - self._looked, 2 * POLL_S) if body == self._seen else 0
        self._seen, self._looked = body, now
        return self._unchanged > LEASE_S or _has_died(body)


def _lease_is_held(url: str) -> bool:
    try:
        return conditional.age(url) <= LEASE_S + MARGIN_S and not _has_died(objects.read_bytes(url))
    except FileNotFoundError:
        return False


def _has_died(body: bytes) -> bool:
    """Whether the holder of a lease ran on this machine and has ended."""
    machine, process = body.decode().split()[:2]
    return machine == _machine() and not _is_alive(int(process))


@lru_cache(maxsize=1)
def _machine() -> str:
    """Name of the set of processes whose numbers are comparable: those of one boot and one PID namespace."""
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
