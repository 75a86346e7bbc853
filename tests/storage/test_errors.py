"""What a storage that fails makes of a command: one line that says what to do, told by types, never by words."""

from __future__ import annotations

import errno
import http.server
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.buffer.cpu import Buffer
from zarr.core.sync import sync

from zoosplat.errors import LockLost, TransientError, Unreachable, UserError
from zoosplat.storage import conditional, fingerprints, groups, listing, objects, s3_client
from zoosplat.storage.errors import as_user_error, name_url_in_errors
from zoosplat.storage.group_store import GroupStore

if TYPE_CHECKING:
    from tests.conftest import S3


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sets variables, and connects anew with them; servers that do not answer are given up soon."""
    for name in ("CONNECT_TIMEOUT_S", "READ_TIMEOUT_S", "REQUEST_TIMEOUT_S", "OUTAGE_S", "PAUSE_S"):
        monkeypatch.setattr(s3_client, name, 1)
    monkeypatch.setattr(s3_client, "_answered_before", False)
    # Nothing of the user's own.
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))

    def set_variables(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        forget()

    yield set_variables
    forget()


def forget() -> None:
    for connected in (s3_client.file_system, s3_client.boto3_session):
        connected.cache_clear()


@pytest.fixture(scope="module")
def strict_s3(s3: S3) -> S3:
    if s3.kind != "minio":
        pytest.skip("this server checks no credentials; make minio")
    return s3


def requests(url: str) -> dict[str, Callable[[], Any]]:
    """All kinds of requests, those through s3fs and those through obstore."""
    file = f"{url}/file"

    def store() -> GroupStore:
        return GroupStore(groups._array_store(url, read_only=False), url, complete=False)

    return {
        "s3fs read": lambda: objects.read_bytes(file),
        "s3fs write": lambda: objects.write_bytes(file, b"data"),
        "s3fs list": lambda: listing.manifest(url),
        "s3fs list folders": lambda: listing.list_folders(url),
        "s3fs stat": lambda: fingerprints.stat(file),
        "s3fs delete": lambda: objects.delete(url),
        "s3fs put if": lambda: conditional.put_if(file, b"data", None),
        "s3fs age": lambda: conditional.age(file),
        "botocore delete if": lambda: conditional.delete_if(file, '"tag"'),
        "obstore open": lambda: groups.open_group(url),
        "obstore read": lambda: store().read_part("mask/c/0", 0, 8),
        "obstore read the end": lambda: store().read_part("mask/c/0", -8, 8),
        "obstore write": lambda: sync(store().set("mask/c/0", Buffer.from_bytes(b"data"))),
    }


def check_all(url: str, line: str, kind: type[UserError], but: tuple[str, ...] = ()) -> None:
    """Each request fails with that line. `but`: those to which the failure looks like another."""
    for name, request in requests(url).items():
        if name in but:
            continue
        with pytest.raises(Exception) as failure:  # noqa: PT011
            request()
        known = as_user_error(failure.value, url)
        assert known is not None, (name, repr(failure.value))
        assert type(known) is kind, name
        assert str(known).startswith(url), name
        assert line in str(known), name
        assert "\n" not in str(known), name


REFUSED = "access refused by the S3 server; check the credentials (AWS_ACCESS_KEY_ID, ...)"


# -- servers that refuse ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [{"AWS_ACCESS_KEY_ID": "nobody"}, {"AWS_SECRET_ACCESS_KEY": "guessed"}, {"AWS_SESSION_TOKEN": "expired"}],
    ids=str,
)
def test_wrong_credentials(wrong: dict[str, str], strict_s3: S3, env: Callable[..., None]) -> None:
    env(**strict_s3.env, **{})
    env(**wrong)
    check_all(f"s3://{strict_s3.bucket()}/p", REFUSED, UserError)


@pytest.mark.parametrize(
    "missing",
    [{"AWS_ACCESS_KEY_ID": None}, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, {"AWS_PROFILE": "none"}],
    ids=str,
)
def test_no_credentials(missing: dict[str, str | None], s3: S3, env: Callable[..., None]) -> None:
    env(**s3.env)
    env(**missing)
    check_all(f"s3://{s3.bucket()}/p", REFUSED, UserError)


def test_no_bucket(s3: S3, env: Callable[..., None]) -> None:
    env(**s3.env)
    # What is only not there is an answer of its own.
    absent = ("s3fs stat", "s3fs age", "obstore open", "obstore read", "obstore read the end")
    check_all("s3://there-is-none/p", "the bucket does not exist; create it first", UserError, but=absent)


def test_no_name_for_a_bucket(strict_s3: S3, env: Callable[..., None]) -> None:
    env(**strict_s3.env)
    url = "s3://Not_A_Name/p"
    with pytest.raises(UserError, match=r"Not_A_Name/p/x: the server does not take this for the name of a bucket"):
        objects.write_bytes(f"{url}/x", b"data")


# -- servers that do not answer -----------------------------------------------------------------------------------
def test_a_server_that_was_stopped(another_s3: None, own_s3: S3, env: Callable[..., None]) -> None:
    env(**own_s3.env)
    url = f"s3://{own_s3.bucket()}/p"
    objects.write_bytes(f"{url}/file", b"data")
    own_s3.stop()
    check_all(url, f"{own_s3.endpoint} cannot be reached; start the server or correct AWS_ENDPOINT_URL", Unreachable)
    own_s3.start()
    assert objects.read_bytes(f"{url}/file") == b"data"


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


def test_nothing_at_that_address(env: Callable[..., None]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else has the port, and nobody listens on it
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        env(**CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
        check_all("s3://bucket/p", f"{endpoint} cannot be reached", Unreachable)


def test_no_such_host(env: Callable[..., None]) -> None:
    env(**CREDENTIALS, AWS_ENDPOINT_URL="http://no-such-host.invalid:9000")
    check_all("s3://bucket/p", "http://no-such-host.invalid:9000 cannot be reached", Unreachable)


def test_https_where_http_is_spoken(s3: S3, env: Callable[..., None]) -> None:
    endpoint = s3.endpoint.replace("http:", "https:")
    env(**s3.env)
    env(AWS_ENDPOINT_URL=endpoint)
    check_all("s3://bucket/p", f"{endpoint} cannot be reached", Unreachable)


class Silent(socketserver.BaseRequestHandler):
    """Stands for a server that hangs."""

    def handle(self) -> None:
        while self.request.recv(1 << 16):
            pass


class Closing(socketserver.BaseRequestHandler):
    """Stands for a server that is killed whenever it is asked."""

    def handle(self) -> None:
        self.request.recv(16)


class Answering(http.server.BaseHTTPRequestHandler):
    """Stands for a server in trouble: the same answer to everything."""

    protocol_version = "HTTP/1.1"
    status, body, cut = 200, b"", False

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) + 100 * self.cut))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("handler", [Silent, Closing])
def test_connections_that_come_to_nothing(
    handler: type[socketserver.BaseRequestHandler], env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    with serving(handler) as endpoint:
        env(**CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
        check_all("s3://bucket/p", f"{endpoint} cannot be reached", Unreachable)


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (503, "XMinioServerNotInitialized"), (500, "InternalError"), (502, "")]
)
def test_servers_that_cannot_serve_now(
    status: int, code: str, env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    body = f"<Error><Code>{code}</Code><Message>Forbidden</Message></Error>" if code else "<html>Forbidden</html>"
    with serving(type("", (Answering,), {"status": status, "body": body.encode()})) as endpoint:
        env(**CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
        check_all("s3://bucket/p", f"{endpoint} cannot serve now (", Unreachable)


def test_a_server_without_space(env: Callable[..., None]) -> None:
    body = b"<Error><Code>XMinioStorageFull</Code><Message>HTTP error</Message></Error>"
    with serving(type("", (Answering,), {"status": 507, "body": body})) as endpoint:
        env(**CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
        check_all("s3://bucket/p", "no space left on the S3 server; free some and run again", UserError)


def test_an_answer_that_breaks_off(env: Callable[..., None]) -> None:
    with serving(type("", (Answering,), {"body": b"the first bytes", "cut": True})) as endpoint:
        env(**CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
        with pytest.raises(Unreachable, match="cannot be reached"):
            objects.read_bytes("s3://bucket/p/file")


# -- what is no failure of the storage ----------------------------------------------------------------------------
def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Forbidden"),
        RuntimeError("HTTP error: error sending request"),
        RuntimeError("AccessDenied: ReadTimeout, ServiceUnavailable, NoSuchBucket: the bucket does not exist"),
        OSError("PermissionError: NoCredentialsError"),
        FileNotFoundError(errno.ENOENT, "no such file", "/data/Forbidden/HTTP error/x"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),  # such as of a server of Prefect's
        raised(RuntimeError("bug"), ValueError("InvalidAccessKeyId")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("url", ["/data/p", "s3://bucket/p"])
def test_words_do_not_matter(error: BaseException, url: str) -> None:
    assert as_user_error(error, url) is None


def test_what_was_going_on_does_not_matter(s3: S3, env: Callable[..., None]) -> None:
    """A fault of ours while a failure of the storage is dealt with is a fault of ours."""
    env(**s3.env)

    def fail() -> None:
        try:
            objects.write_bytes("s3://there-is-none/p", b"data")
        except UserError:
            raise AssertionError("our fault")  # noqa: B904

    with pytest.raises(AssertionError, match="our fault") as failure:
        fail()
    assert failure.value.__context__ is not None
    assert as_user_error(failure.value, "s3://there-is-none/p") is None


def test_lines_for_the_user_stay_as_they_are() -> None:
    for kind in (UserError, TransientError, Unreachable, LockLost):
        error = kind("masks/2.mp4: HTTP error, Forbidden, NoSuchBucket")
        assert as_user_error(error, "s3://bucket/p") is error


def test_lines_of_inner_calls_stay_as_they_are(tmp_path: Path) -> None:
    inner = UserError("camera 3 is Forbidden")

    @name_url_in_errors
    def outer(url: str) -> None:
        raise inner

    with pytest.raises(UserError) as failure:
        outer(str(tmp_path))
    assert failure.value is inner
    assert failure.value.__cause__ is None


def test_an_error_that_is_its_own_cause() -> None:
    error = ValueError("x")
    assert as_user_error(raised(error, error), "/data/p") is None


# -- disks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "/data/p: no space left; free some and run again, finished work is kept"),
        (errno.EDQUOT, "/data/p: no space left; free some and run again, finished work is kept"),
        (errno.EROFS, "/data/p/HTTP error: read-only file system; choose another folder"),
        (errno.EACCES, "/data/p/HTTP error: permission denied; make it accessible"),
        (errno.EPERM, "/data/p/HTTP error: permission denied; make it accessible"),
    ],
)
def test_disks_that_refuse(number: int, line: str) -> None:
    error = OSError(number, "Forbidden", "/data/p/HTTP error")
    assert str(as_user_error(error, "/data/p")) == line
    assert str(as_user_error(raised(RuntimeError("x"), error), "/data/p")) == line


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"")
    with pytest.raises(UserError) as failure:
        objects.write_bytes(str(tmp_path / "p" / "x"), b"data")
    assert str(failure.value) == f"{tmp_path}/p/x: {tmp_path}/p is a file; choose another folder"
