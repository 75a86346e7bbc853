"""The only module that opens URLs: plain files through fsspec, zarr arrays through zarr's own stores.

A URL is a local path, `file://...` or `s3://bucket/prefix`. S3 follows the standard credential chain and
`AWS_ENDPOINT_URL`; arrays go through obstore, which is several times faster than s3fs for many objects.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache, wraps
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar, cast

import zarr
from zarr.abc.store import Store

from zoosplat.errors import UserError

# Together less than half a minute, after which a server that does not answer is reported.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 8
ATTEMPTS = 3
REQUEST_TIMEOUT_S = 60  # of a whole put or get of an array's block


def normalize(url: str) -> str:
    """Absolute local path or `s3://bucket/prefix`, without a trailing slash.

    Raises:
        UserError: another scheme, an S3 URL without a bucket, or `..` in an S3 URL.
    """
    if url.startswith("s3://"):
        parts = url[5:].rstrip("/").split("/")
        if not parts[0] or ".." in parts:
            raise UserError(f"{url}: an S3 URL is s3://bucket/prefix, without '..'")
        return "s3://" + "/".join(parts)
    if url.startswith("file://"):
        url = url[7:]
    elif "://" in url:
        raise UserError(f"{url}: unknown kind of URL; use a folder or s3://bucket/prefix")
    return os.path.abspath(os.path.expanduser(url))


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *(p.strip("/") for p in parts)])


@lru_cache(maxsize=1)
def _s3() -> Any:
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]
    from botocore.handlers import add_expect_header

    s3fs.S3FileSystem.retries = ATTEMPTS
    session = AioSession()
    # Without it a put does not wait for leave to send, for which there is no timeout: a stuck server would hold it.
    session.unregister("before-call.s3", add_expect_header)
    return s3fs.S3FileSystem(
        session=session,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": 1},  # s3fs tries again itself
        },
    )


P = ParamSpec("P")
R = TypeVar("R")


def _naming_the_url(function: Callable[P, R]) -> Callable[P, R]:
    """Report what the user can mend under the URL at fault, the first argument; what is only not there is raised on."""

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            known = as_user_error(error, str(args[0]))
            if known is None:
                raise
            raise known from error

    return named


@_naming_the_url
def read_bytes(url: str) -> bytes:
    """Whole content of a file. FileNotFoundError where there is none."""
    if is_s3(url):
        return cast(bytes, _s3().cat_file(url))
    return Path(url).read_bytes()


@_naming_the_url
def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all: one put on S3, a rename on a file system."""
    if is_s3(url):
        _s3().pipe_file(url, data)
        return
    path = Path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(url: str) -> dict[str, Any] | None:
    """A JSON object, or None where the file does not exist."""
    try:
        return cast(dict[str, Any], json.loads(read_bytes(url)))
    except FileNotFoundError:
        return None


def write_json(url: str, value: dict[str, Any]) -> None:
    write_bytes(url, json.dumps(value, indent=1, sort_keys=True).encode())


@_naming_the_url
def exists(url: str) -> bool:
    if is_s3(url):
        return bool(_s3().exists(url))
    return os.path.exists(url)


@_naming_the_url
def open_read(url: str) -> IO[bytes]:
    """A seekable binary file for reading; on S3 it fetches ahead in 4 MiB blocks."""
    if is_s3(url):
        return cast(IO[bytes], _s3().open(url, "rb", block_size=4 << 20, cache_type="readahead"))
    return open(url, "rb")


@_naming_the_url
def size(url: str) -> int:
    if is_s3(url):
        return int(_s3().info(url)["size"])
    return os.path.getsize(url)


@_naming_the_url
def fingerprint(url: str) -> str:
    """Identity of a file's content that is cheap for a video of any length: size, first and last 64 KiB."""
    n = size(url)
    with open_read(url) as file:
        head = file.read(1 << 16)
        file.seek(max(0, n - (1 << 16)))
        tail = file.read()
    return hashlib.sha256(b"%d\n" % n + head + tail).hexdigest()


def list_files(url: str) -> Iterator[str]:
    """Every file below a URL, as paths relative to it, sorted."""
    if is_s3(url):
        prefix = url[5:].rstrip("/") + "/"
        yield from sorted(name[len(prefix) :] for name in _s3().find(url) if name.startswith(prefix))
    else:
        root = Path(url)
        yield from sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@_naming_the_url
def delete(url: str) -> None:
    """Remove a file or everything below a URL; nothing there is fine."""
    if is_s3(url):
        if _s3().exists(url):
            _s3().rm(url, recursive=True)
        return
    path = Path(url)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(url: str) -> None:
    """Remove what a killed writer left of a local file or below a folder (S3 puts are atomic and leave nothing)."""
    if not is_s3(url):
        target = Path(url)
        for path in [*target.parent.glob(f"{target.name}.*.partial"), *target.rglob("*.partial")]:
            path.unlink(missing_ok=True)


def _zarr_store(url: str, *, read_only: bool) -> Store:
    if not is_s3(url):
        return zarr.storage.LocalStore(url, read_only=read_only)
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    bucket, _, prefix = url[5:].partition("/")
    session, endpoint, region = _boto3_session()
    store = S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=endpoint,
        region=region,
        virtual_hosted_style_request=endpoint is None,
        credential_provider=Boto3CredentialProvider(session),
        client_options={
            "allow_http": True,
            "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
            "timeout": f"{REQUEST_TIMEOUT_S}s",
        },
        retry_config={"max_retries": ATTEMPTS - 1, "retry_timeout": timedelta(seconds=READ_TIMEOUT_S * ATTEMPTS)},
    )
    return zarr.storage.ObjectStore(store, read_only=read_only)


@lru_cache(maxsize=1)
def _boto3_session() -> tuple[Any, str | None, str]:
    import boto3

    session = boto3.Session()
    client = session.client("s3", region_name=session.region_name or "us-east-1")
    endpoint = str(client.meta.endpoint_url)
    return session, None if endpoint.endswith("amazonaws.com") else endpoint, session.region_name or "us-east-1"


@_naming_the_url
def open_group(url: str, *, write: bool = False) -> zarr.Group:
    """An existing zarr v3 group. FileNotFoundError where there is none."""
    return zarr.open_group(_zarr_store(url, read_only=not write), mode="r+" if write else "r", zarr_format=3)


@_naming_the_url
def create_group(url: str, attributes: dict[str, Any]) -> zarr.Group:
    """A new, empty zarr v3 group in place of whatever is at the URL."""
    delete(url)
    return zarr.create_group(_zarr_store(url, read_only=False), zarr_format=3, attributes=attributes)


_REFUSED = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "Forbidden",
    "PermissionError",
    "NoCredentialsError",
    "Unable to locate credentials",
    "InvalidToken",
    "ExpiredToken",
    "Unauthenticated",
)
_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeout",
    "error sending request",
    "ConnectionClosedError",
    "Connect call failed",
    "ClientConnectorError",
    "ConnectionRefusedError",
    "ReadTimeout",
    "HTTP error",
)


def as_user_error(error: BaseException, url: str) -> UserError | None:
    """What a storage failure means to the user, in one line; None where it is not a storage failure."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__}: {seen}"
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"{url}: no space left; free some and run again, finished work is kept")
        if isinstance(seen, OSError) and seen.errno == errno.EROFS:
            return UserError(f"{getattr(seen, 'filename', None) or url}: read-only file system; choose another folder")
        if isinstance(seen, OSError) and seen.errno in (errno.EACCES, errno.EPERM) and not is_s3(url):
            return UserError(f"{getattr(seen, 'filename', None) or url}: permission denied; make it accessible")
        if any(word in text for word in ("NoSuchBucket", "bucket does not exist")):
            return UserError(f"{url}: the bucket does not exist; create it first")
        if any(word in text for word in _REFUSED):
            return UserError(f"{url}: access refused by the S3 server; check the credentials (AWS_ACCESS_KEY_ID, ...)")
        if any(word in text for word in _UNREACHABLE):
            where = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
            return UserError(f"{url}: {where} cannot be reached; start the server or correct AWS_ENDPOINT_URL")
        seen = seen.__cause__ or seen.__context__
    return None
