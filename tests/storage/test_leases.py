"""Locks: one holder at a time, whatever answers of the storage are lost; a lock that was lost is noticed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoosplat.errors import LockLost, Unreachable
from zoosplat.storage import conditional, leases, objects
from zoosplat.storage.leases import is_held, locked, try_locked

if TYPE_CHECKING:
    from tests.conftest import S3

OTHER = b"another-machine 1 0123456789abcdef 1"


@pytest.fixture(autouse=True)
def no_keeper_outlives_its_lock() -> Iterator[None]:
    yield
    assert keepers() == []


def keepers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("keeper")]


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, s3_here: S3, tmp_path: Path) -> str:
    """Name of a lock that nobody has."""
    return f"{tmp_path if request.param == 'disk' else f's3://{s3_here.bucket()}'}/results/pack/1f/lease"


@pytest.fixture
def on_s3(s3_here: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on S3, renewed often."""
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    return f"s3://{s3_here.bucket()}/results/pack/1f/lease"


def never() -> None:
    raise AssertionError("nobody holds it")


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def content(url: str) -> bytes | None:
    try:
        return objects.read_bytes(url)
    except FileNotFoundError:
        return None


# -- one holder ---------------------------------------------------------------------------------------------------
def test_two_that_contend_never_both_hold(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    inside, entered = [0], []

    def contend(name: str) -> None:
        for _ in range(50):
            with locked(url, lambda: None) as held:
                inside[0] += 1
                assert inside == [1]
                entered.append(name)
                time.sleep(0.001)
                held.check()
                inside[0] -= 1

    threads = [threading.Thread(target=contend, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (entered.count("a"), entered.count("b")) == (50, 50)
    assert content(url) is None


def test_what_is_held_is_refused_at_once(url: str) -> None:
    with locked(url, never) as held:
        assert not held.lost
        with try_locked(url) as second:
            assert second is None
        assert content(url) is not None, "who got nothing has nothing to release"
        held.check()
    with try_locked(url) as third:
        assert third is not None
        third.check()
    assert content(url) is None


def test_who_waits_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    waited = []
    release = threading.Event()

    def hold() -> None:
        with locked(url, never):
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    until(lambda: is_held(url))

    def waiting() -> None:
        waited.append(1)
        if len(waited) == 3:
            release.set()

    with locked(url, waiting):
        assert len(waited) >= 3
    holder.join()


def test_one_who_gives_up_waiting_leaves_the_lock(url: str) -> None:
    with locked(url, never) as held:
        with pytest.raises(KeyboardInterrupt), locked(url, lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
            pass
        held.check()


# -- who holds it -------------------------------------------------------------------------------------------------
def test_is_held(url: str) -> None:
    assert not is_held(url)
    assert content(url) is None
    assert not Path(url).parent.exists(), "nothing is made"
    with locked(url, never):
        assert is_held(url)
        assert content(url) is not None
    assert not is_held(url)


def test_looking_does_not_disturb(tmp_path: Path) -> None:
    """Who takes a file's lock is not refused because somebody looks whether it is held."""
    url, done = str(tmp_path / "lease"), threading.Event()

    def look() -> None:
        while not done.is_set():
            is_held(url)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            with try_locked(url) as held:
                assert held is not None
    finally:
        done.set()
        watcher.join()


def test_a_look_that_lasts_does_not_disturb(tmp_path: Path) -> None:
    """Who looks may be suspended while the file is locked for it."""
    path = tmp_path / "lease"
    file = os.open(path, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_SH)
    watcher = threading.Timer(0.1, os.close, [file])
    watcher.start()
    with try_locked(str(path)) as held:
        assert held is not None
    watcher.join()


def test_the_lock_of_a_process_that_was_killed_on_this_machine(url: str, s3_here: S3) -> None:
    program = "import os, sys, time; from zoosplat.storage.leases import locked\nwith locked(sys.argv[1], print):\n"
    program += "    print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, url]
    with subprocess.Popen(command, env={**os.environ, **s3_here.env}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_held(url)
        with try_locked(url) as held:
            assert held is None
        process.kill()
        process.wait()
    assert content(url) is not None, "it had no time to remove it"
    assert not is_held(url)
    with try_locked(url) as held:
        assert held is not None


def test_the_lock_of_a_process_elsewhere(on_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held while it is young, by the server's clock; taken over after LEASE_S of waiting and not before."""
    for name, value in (("LEASE_S", 2), ("MARGIN_S", 1), ("POLL_S", 0.05)):
        monkeypatch.setattr(leases, name, value)
    objects.write_bytes(on_s3, OTHER)
    assert is_held(on_s3)
    with try_locked(on_s3) as held:
        assert held is None
    began = time.monotonic()
    with locked(on_s3, lambda: None) as held:
        assert time.monotonic() - began > 2
        held.check()
    objects.write_bytes(on_s3, OTHER)
    until(lambda: not is_held(on_s3))
    assert content(on_s3) == OTHER


def test_a_lock_that_is_renewed_is_not_taken_over(on_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.05)
    with locked(on_s3, never) as first:
        monkeypatch.setattr(leases, "LEASE_S", 1)
        began = time.monotonic()

        def waiting() -> None:
            if time.monotonic() - began > 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), locked(on_s3, waiting):
            pass
        assert not first.lost


# -- answers that are lost ----------------------------------------------------------------------------------------
class AnswersLost:
    """Stands for a network on which requests or their answers are lost; the server behind it is a real one.

    Attributes:
        put, removal: what happens to the next requests, in turn; when there are no more, requests succeed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.put: list[str] = []
        self.removal: list[str] = []
        self.puts = 0
        self._put_if, self._delete_if = conditional.put_if, conditional.delete_if
        monkeypatch.setattr(conditional, "put_if", self.put_if)
        monkeypatch.setattr(conditional, "delete_if", self.delete_if)

    def put_if(self, url: str, data: bytes, etag: str | None) -> str | None:
        assert etag != "", "an empty ETag is none"
        self.puts += 1
        fate = self.put.pop(0) if self.put else ""
        if fate == "request lost":
            raise Unreachable("no answer")
        answer = self._put_if(url, data, etag)
        if fate == "sent again":
            assert answer is not None
            answer = self._put_if(url, data, etag)
            assert answer is None
        if fate == "answer lost":
            raise Unreachable("no answer")
        return answer

    def delete_if(self, url: str, etag: str) -> None:
        fate = self.removal.pop(0) if self.removal else ""
        if fate != "request lost":
            self._delete_if(url, etag)
        if fate:
            raise Unreachable("no answer")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> AnswersLost:
    return AnswersLost(monkeypatch)


@pytest.mark.parametrize("fate", ["answer lost", "sent again"])
def test_the_first_put(fate: str, on_s3: str, network: AnswersLost) -> None:
    network.put = [fate]
    with locked(on_s3, never) as held:
        first = content(on_s3)
        until(lambda: content(on_s3) != first)  # it is renewed
        held.check()
        assert len(keepers()) == 1
    assert content(on_s3) is None


def test_a_first_put_that_does_not_arrive(on_s3: str, network: AnswersLost) -> None:
    network.put = ["request lost"]
    with pytest.raises(Unreachable), locked(on_s3, never):
        pass
    assert content(on_s3) is None
    with locked(on_s3, never):
        pass


@pytest.mark.parametrize("fates", [["answer lost"] * 3, ["sent again"] * 3, ["request lost"] * 3], ids=str)
def test_a_renewal(fates: list[str], on_s3: str, network: AnswersLost) -> None:
    """Whatever becomes of it, the keeper goes on."""
    with locked(on_s3, never) as held:
        network.put = list(fates)
        until(lambda: not network.put)
        before, puts = content(on_s3), network.puts
        until(lambda: network.puts > puts + 2)
        assert content(on_s3) not in (None, before)
        assert not held.lost
        held.check()
    assert content(on_s3) is None


def test_a_take_over(on_s3: str, network: AnswersLost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LEASE_S", 1), ("POLL_S", 0.05)):
        monkeypatch.setattr(leases, name, value)
    objects.write_bytes(on_s3, OTHER)
    network.put = ["answer lost"]
    with locked(on_s3, lambda: None) as held:
        held.check()
        assert content(on_s3) != OTHER
    assert content(on_s3) is None


def test_a_removal(on_s3: str, network: AnswersLost, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent once: when its answer is lost, the object may be another's by then."""
    network.removal = ["answer lost"]
    with locked(on_s3, never):
        pass
    assert content(on_s3) is None
    for name, value in (("LEASE_S", 1), ("POLL_S", 0.05)):
        monkeypatch.setattr(leases, name, value)
    network.removal = ["request lost"]
    with locked(on_s3, never):
        pass
    assert content(on_s3) is not None
    began = time.monotonic()
    with locked(on_s3, lambda: None):
        assert time.monotonic() - began > 1


# -- locks that are lost ------------------------------------------------------------------------------------------
def test_a_lock_that_another_has_taken_is_noticed(on_s3: str) -> None:
    with locked(on_s3, never) as held:
        objects.write_bytes(on_s3, OTHER)
        until(lambda: held.lost)
        with pytest.raises(LockLost, match=r"results/pack/1f/lease: another run has taken this work over; run again"):
            held.check()
    assert content(on_s3) == OTHER


def test_a_lock_that_was_removed_is_noticed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may have had it since."""
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    with locked(url, never) as first:
        objects.delete(url)
        until(lambda: first.lost)
        with pytest.raises(LockLost, match="lease"):
            first.check()
        with locked(url, never) as second:
            second.check()
            assert first.lost


def test_the_lock_of_the_next_is_not_released_by_the_one_before(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    first, second = locked(url, never), locked(url, never)
    with first:
        objects.delete(url)
        held = second.__enter__()
    held.check()
    assert is_held(url)
    second.__exit__(None, None, None)
    assert not is_held(url)


def test_who_was_cut_off_asks_before_going_on(
    on_s3: str, network: AnswersLost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a laptop that was asleep: another had all the time to take the lock over, unseen by the keeper."""
    monkeypatch.setattr(leases, "RENEW_S", 3600)
    with locked(on_s3, never) as held:
        objects.write_bytes(on_s3, OTHER)
        held.check()  # as yet there is no reason to doubt
        monkeypatch.setattr(leases, "LEASE_S", 0)
        assert not held.lost
        with pytest.raises(LockLost):
            held.check()
        assert held.lost


def test_who_is_cut_off_is_told(on_s3: str, network: AnswersLost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 3600)
    with locked(on_s3, never) as held:
        network.put = ["request lost"]
        monkeypatch.setattr(conditional, "etag", lambda url: (_ for _ in ()).throw(Unreachable("no answer")))
        held.check()
        monkeypatch.setattr(leases, "LEASE_S", 0)
        with pytest.raises(Unreachable):
            held.check()
        monkeypatch.undo()


def test_an_outage_of_the_server(another_s3: None, own_s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody reaches it, nobody can take the lock over: the holder goes on with it when the server is back."""
    for variable, text in own_s3.env.items():
        monkeypatch.setenv(variable, text)
    for name, value in (("LEASE_S", 2), ("RENEW_S", 0.1), ("POLL_S", 0.1)):
        monkeypatch.setattr(leases, name, value)
    url = f"s3://{own_s3.bucket()}/lease"
    others: list[Any] = []

    def wait_for_it() -> None:
        with locked(url, lambda: None):
            others.append(held.lost)

    with locked(url, never) as held:
        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        own_s3.stop()
        time.sleep(4)
        own_s3.start()
        before = content(url)
        until(lambda: content(url) != before)
        held.check()
        assert others == []
    waiter.join()
    assert others == [False]
