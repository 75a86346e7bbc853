"""The only module that opens URLs: plain files through fsspec, zarr arrays through zarr's own stores.

A URL is a local path, `file://...` or `s3://bucket/prefix`. S3 follows the standard credential chain and
`AWS_ENDPOINT_URL`; arrays go through obstore, which is several times faster than s3fs for many objects.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache, wraps
from pathlib import Path
from stat import S_ISDIR
from typing import IO, Any, ParamSpec, TypeVar, cast

import zarr
from zarr.abc.store import Store

from zoosplat.errors import UserError
from zoosplat.storage import writing
from zoosplat.storage.errors import as_user_error as as_user_error
from zoosplat.storage.errors import is_unreachable
from zoosplat.storage.group_store import GroupStore, lost, sync_path, sync_written

# Together less than half a minute, after which a server that has never answered is reported.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 8
ATTEMPTS = 3
REQUEST_TIMEOUT_S = 60  # of a whole put or get of an array's block
OUTAGE_S = 30  # a server that has answered before is waited for: it is restarted, or a node moves
PAUSE_S = 1
KEYS_AT_ONCE = 1000  # S3's limit, of a listing and of a deletion
HASHED_AT_ONCE = 4 << 20
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system, FAT's
S3_ONLY = "ZOOSPLAT_S3_ONLY"


def normalize(url: str) -> str:
    """Absolute local path or `s3://bucket/prefix`, without a trailing slash.

    Raises:
        UserError: another scheme, an S3 URL without a bucket, `..` or control characters in an S3 URL, or a local path
            where ZOOSPLAT_S3_ONLY is set, as it is in containers: they hold nothing of the user's.
    """
    if url.startswith("s3://"):
        parts = url[5:].rstrip("/").split("/")
        if not parts[0] or ".." in parts or not url.isprintable():
            raise UserError(f"{url!a}: an S3 URL is s3://bucket/prefix, without '..' and control characters")
        return "s3://" + "/".join(parts)
    if url.startswith("file://"):
        url = url[7:]
    elif "://" in url:
        raise UserError(f"{url}: unknown kind of URL; use a folder or s3://bucket/prefix")
    _check_local(url)
    return os.path.abspath(os.path.expanduser(url))


def _check_local(url: str) -> None:
    """Raise UserError where local files are not to be used.

    Everything that reads a file asks: a URL may come from the record of a run or the plan of a stage, which whoever can
    write to the project can change.
    """
    if os.environ.get(S3_ONLY):
        raise UserError(f"{url}: stages in containers read and write S3 alone; use s3://bucket/prefix")


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *(p.strip("/") for p in parts)])


_reached_before = False


def expect_answers() -> None:
    """Wait for the S3 server from the first request on: the process that has started this one has reached it."""
    global _reached_before
    _reached_before = True


@lru_cache(maxsize=1)
def _s3() -> Any:
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]
    from botocore.handlers import add_expect_header

    class Patient(s3fs.S3FileSystem):  # type: ignore[misc]
        retries = ATTEMPTS
        answered = _reached_before

        async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
            """As s3fs, which gives up at once where nothing listens; a wrong endpoint is still reported at once."""
            waited: float = 0
            while True:
                try:
                    answer = await super()._call_s3(method, *args, **kwargs)
                except Exception as error:
                    if not is_unreachable(error):
                        self.answered = True
                        raise
                    if not self.answered or waited >= OUTAGE_S:
                        raise
                    began = time.monotonic()
                    await asyncio.sleep(PAUSE_S)
                    waited += time.monotonic() - began
                else:
                    self.answered = True
                    return answer

    session = AioSession()
    # Without it a put does not wait for leave to send, for which there is no timeout: a stuck server would hold it.
    session.unregister("before-call.s3", add_expect_header)
    return Patient(
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
            if known is None or known is error:
                raise
            raise known from error

    return named


@_naming_the_url
def read_bytes(url: str) -> bytes:
    """Whole content of a file. FileNotFoundError where there is none."""
    if is_s3(url):
        return cast(bytes, _s3().cat_file(url))
    _check_local(url)
    return Path(url).read_bytes()


@_naming_the_url
def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all: one put on S3, a rename on a file system.

    On a file system it is there after a power cut only if what this process had written to groups before is there too.
    """
    writing.check()
    if is_s3(url):
        _s3().pipe_file(url, data)
        return
    path = Path(url)
    try:
        _make_folder(path.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{url}: {error.filename} is a file; choose another folder") from None
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_written()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_path(path.parent)


def _make_folder(path: Path) -> None:
    path = Path(os.path.realpath(path))  # a link to a folder that is not there yet is no reason to fail
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(new):
        sync_path(folder.parent)


def read_json(url: str) -> dict[str, Any] | None:
    """A JSON object, or None where the file does not exist. Raises UserError where it holds anything else."""
    try:
        value = json.loads(read_bytes(url))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{url}: is damaged: holds no JSON object; remove it, or put it back from a copy")
    return cast(dict[str, Any], value)


def write_json(url: str, value: dict[str, Any]) -> None:
    write_bytes(url, json.dumps(value, indent=1, sort_keys=True).encode())


def create_json(url: str, value: dict[str, Any]) -> bool:
    """Write a JSON object unless the file exists; whether this has written it.

    On S3 no two processes write it both. On a file system they might: there, who writes holds a lock.
    """
    if not is_s3(url):
        if exists(url):
            return False
        write_json(url, value)
        return True
    writing.check()
    data = json.dumps(value, indent=1, sort_keys=True).encode()
    # What is there already may be of this very call, whose answer was lost.
    return put_if(url, data, None) is not None or read_bytes(url) == data


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
    _check_local(url)
    return open(url, "rb")


@_naming_the_url
def size(url: str) -> int:
    if is_s3(url):
        return int(_s3().info(url)["size"])
    return os.path.getsize(url)


@_naming_the_url
def stat(url: str) -> tuple[int, str]:
    """Size in bytes of a file, and a token that changes whenever the file is written.

    Returns:
        The size; on S3 the ETag, on a file system the times of the last change and the inode.

    Raises:
        FileNotFoundError: there is nothing.
        IsADirectoryError: it is a folder.
    """
    if is_s3(url):
        found = _s3().info(url)
        if found["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
        return int(found["size"]), str(found["ETag"]).strip('"')
    size, *version = _version(os.stat(url), url)
    return size, "-".join(str(part) for part in version)


def _version(status: os.stat_result, url: str) -> list[int]:
    """Size, times in ns and inode of a local file: what tells that it was written, though its mtime was set back."""
    if S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@_naming_the_url
def content_fingerprint(url: str, cache: dict[str, Any] | None = None) -> str:
    """Identity of a file's whole content: its MD5 in hexadecimal, which S3 has at hand as the ETag.

    An object that was uploaded in several parts has another ETag, which stands for its content all the same.

    Args:
        url: a file.
        cache: fingerprints of local files that were read before; what is read now is added. JSON values:
            `{path: [size, mtime_ns, ctime_ns, inode, fingerprint]}`. None: read the file in any case.

    Raises:
        FileNotFoundError: there is nothing.
        IsADirectoryError: it is a folder.
        UserError: the file is being written, or cannot be read.
    """
    if is_s3(url):
        return stat(url)[1]
    with open(url, "rb") as file:
        version = _version(os.fstat(file.fileno()), url)
        known = (cache or {}).get(url)
        if known is not None and list(known[:-1]) == version:
            return str(known[-1])
        digest = hashlib.md5(usedforsecurity=False)
        while data := file.read(HASHED_AT_ONCE):
            digest.update(data)
        if _version(os.fstat(file.fileno()), url) != version:
            raise UserError(f"{url}: is being written; run again when it is complete")
    # Times come from a clock that ticks: a file that is written twice within a tick bears the same time.
    if cache is not None and time.time_ns() - version[2] > SETTLED_NS:
        cache[url] = [*version, digest.hexdigest()]
    return digest.hexdigest()


def is_settled(url: str) -> bool:
    """Whether a file's token of `stat` tells that it is written again: not while its times are those of just now.

    Times come from a clock that ticks: a file that is written twice within a tick bears the same time.
    """
    if is_s3(url):
        return True
    try:
        return time.time_ns() - os.stat(url).st_ctime_ns > SETTLED_NS
    except OSError:
        return False


@_naming_the_url
def legacy_fingerprint(url: str) -> str:
    """What projects of the first layout know a file by: its size, first and last 64 KiB."""
    n = size(url)
    with open_read(url) as file:
        head = file.read(1 << 16)
        file.seek(max(0, n - (1 << 16)))
        tail = file.read()
    return hashlib.sha256(b"%d\n" % n + head + tail).hexdigest()


def _call_s3(method: str, **arguments: Any) -> Any:
    """A request of the S3 API that s3fs has no function for, with its retries."""
    from fsspec import asyn

    return asyn.sync(_s3().loop, _s3()._call_s3, method, **arguments)


def _pages(url: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The listing of what lies below a URL on S3, an answer at a time."""
    bucket, _, prefix = url[5:].rstrip("/").partition("/")
    arguments |= {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": KEYS_AT_ONCE}
    while True:
        page = _call_s3("list_objects_v2", **arguments)
        yield page
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


@_naming_the_url
def manifest(url: str) -> dict[str, int]:
    """Size in bytes of every file below a URL, by its path relative to it, sorted.

    Of a file it is the size by the empty path. Where there is nothing it is empty.
    """
    found: dict[str, int] = {}
    if is_s3(url):
        for page in _pages(url):
            prefix = page.get("Prefix", "")
            # Consoles make an empty object whose name ends in "/" for a folder.
            objects = (each for each in page.get("Contents", []) if not each["Key"].endswith("/"))
            found |= {each["Key"][len(prefix) :]: int(each["Size"]) for each in objects}
    else:
        for folder, _, names in os.walk(url, onerror=_unless_absent):
            for name in names:
                path = os.path.join(folder, name)
                # A link that leads nowhere is no file, and a file may be removed meanwhile.
                with suppress(FileNotFoundError):
                    found[os.path.relpath(path, url).replace(os.sep, "/")] = os.stat(path).st_size
    if not found:
        with suppress(FileNotFoundError, IsADirectoryError):
            return {"": stat(url)[0]}
    return dict(sorted(found.items()))


def check_manifest(url: str, expected: dict[str, int]) -> None:
    """Compare what lies below a URL with what `manifest` once found there; files besides are of no concern.

    Raises:
        UserError: naming the first file that is missing or of another size.
    """
    found = manifest(url)
    for name, n in sorted(expected.items()):
        where = join(url, name).rstrip("/")
        if name not in found:
            raise lost(where, "is missing")
        if found[name] != n:
            raise lost(where, f"is damaged: {found[name]} bytes instead of {n}")


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def list_files(url: str) -> Iterator[str]:
    """Every file below a URL, as paths relative to it, sorted."""
    yield from (name for name in manifest(url) if name)


@_naming_the_url
def list_dirs(url: str) -> list[str]:
    """Names of the folders directly below a URL, sorted; none where there is nothing. One request on S3."""
    if is_s3(url):
        pages = _pages(url, Delimiter="/")
        return sorted(
            p["Prefix"].rstrip("/").rpartition("/")[2] for page in pages for p in page.get("CommonPrefixes", [])
        )
    try:
        with os.scandir(url) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []


@_naming_the_url
def list_names(url: str) -> list[str]:
    """Names of the files and folders directly below a URL, sorted; none where there is no such folder."""
    if not is_s3(url):
        return sorted(os.listdir(url)) if os.path.isdir(url) else []
    found = set[str]()
    for page in _pages(url, Delimiter="/"):
        keys = [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
        keys += [entry["Key"] for entry in page.get("Contents", [])]
        found |= {key.rstrip("/").rpartition("/")[2] for key in keys if key != page["Prefix"]}
    return sorted(found)


@_naming_the_url
def first_file(url: str) -> str | None:
    """A file below a URL, as a path relative to it; empty where the URL is a file itself, None where there is none.

    Where there are many it takes no longer. A symbolic link to a folder counts as a file.
    """
    if is_s3(url):
        bucket, _, key = url[5:].rstrip("/").partition("/")
        keys = [str(entry["Key"]) for entry in next(_pages(url)).get("Contents", [])]
        # Consoles make folders by objects whose names end so.
        keys = [name for name in keys if not name.endswith("/")]
        if keys:
            return keys[0].removeprefix(f"{key}/")
        # The shortest name is the first.
        same = _call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        return "" if same and same[0]["Key"] == key else None
    if not os.path.isdir(url):
        return "" if os.path.lexists(url) else None
    for folder, folders, files in os.walk(url):
        folders.sort()
        files += [name for name in folders if os.path.islink(os.path.join(folder, name))]
        if files:
            return os.path.relpath(os.path.join(folder, min(files)), url)
    return None


@_naming_the_url
def delete(url: str) -> None:
    """Remove a file or everything below a URL; nothing there is fine."""
    writing.check()
    if is_s3(url):
        _delete_objects(url)
        return
    path = Path(url)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _delete_objects(url: str) -> None:
    """Not s3fs's rm, which takes `*`, `?` and `[` of a URL for patterns and is silent about what it may not delete."""
    from botocore.exceptions import ClientError

    bucket = url[5:].partition("/")[0]
    keys = [name[len(bucket) + 1 :] for name in _s3().find(url)]
    for i in range(0, len(keys), KEYS_AT_ONCE):
        objects = {"Objects": [{"Key": key} for key in keys[i : i + KEYS_AT_ONCE]], "Quiet": True}
        answer = _call_s3("delete_objects", Bucket=bucket, Delete=objects)
        for failed in answer.get("Errors", []):
            # Said of an object within a good answer: as the answer to a request for it alone would have been.
            status = 403 if failed["Code"] == "AccessDenied" else 500
            raise ClientError({"Error": failed, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")


def remove_partials(url: str) -> None:
    """Remove what a killed writer left of a local file or below a folder (S3 puts are atomic and leave nothing)."""
    if not is_s3(url):
        target = Path(url)
        for path in [*target.parent.glob(f"{target.name}.*.partial"), *target.rglob("*.partial")]:
            path.unlink(missing_ok=True)


@_naming_the_url
def etag(url: str) -> str:
    """Of an object on S3. Raises FileNotFoundError."""
    return str(_s3().info(url)["ETag"])


@_naming_the_url
def age(url: str) -> float:
    """Seconds since an object on S3 was written, by the server's own clock, in whole seconds. FileNotFoundError."""
    bucket, _, key = url[5:].partition("/")
    answer = _call_s3("head_object", Bucket=bucket, Key=key)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


@_naming_the_url
def put_if(url: str, data: bytes, etag: str | None) -> str | None:
    """Write an object on S3 in place of the one with that ETag, None: where there is none.

    Returns:
        Its ETag; None where another has been there first. That other one may be this very call: it is sent again where
        the answer was lost, and the second time the object is there.
    """
    condition = {"mode": "create"} if etag is None else {"IfMatch": etag}
    try:
        return str(_s3().pipe_file(url, data, **condition)["ETag"])
    except OSError as error:
        gone = ("NoSuchKey",) if etag is not None else ()
        if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", *gone):
            return None
        raise


def _code(error: BaseException) -> str:
    """S3's code of an error that it answered with and s3fs translated; empty where it is none."""
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@_naming_the_url
def delete_if(url: str, etag: str) -> None:
    """Remove an object on S3 if it has that ETag, with one request: a second one could meet what another put there.

    MinIO does not look at the ETag.
    """
    from fsspec import asyn

    bucket, _, key = url[5:].partition("/")

    async def send() -> None:
        await _s3().set_session()
        client = await _s3().get_s3(bucket)
        await client.delete_object(Bucket=bucket, Key=key, IfMatch=etag)

    asyn.sync(_s3().loop, send)


# -- arrays -------------------------------------------------------------------------------------------------------
def _zarr_store(url: str, *, read_only: bool) -> Store:
    if not is_s3(url):
        _check_local(url)
        return zarr.storage.LocalStore(url, read_only=read_only)
    from botocore.exceptions import NoCredentialsError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    bucket, _, prefix = url[5:].partition("/")
    session, endpoint, region = _boto3_session()
    if session.get_credentials() is None:
        raise NoCredentialsError
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
        retry_config={
            "max_retries": 2 * OUTAGE_S,
            "retry_timeout": timedelta(seconds=OUTAGE_S),
            "backoff": {"max_backoff": timedelta(seconds=PAUSE_S)},
        },
    )
    return zarr.storage.ObjectStore(store, read_only=read_only)


def part_of(store: Store, key: str, start: int, length: int) -> bytes:
    """Part of an object of a group's store, as `GroupStore.part`."""
    assert isinstance(store, GroupStore)
    return store.part(key, start, length)


@lru_cache(maxsize=1)
def _boto3_session() -> tuple[Any, str | None, str]:
    import boto3

    session = boto3.Session()
    client = session.client("s3", region_name=session.region_name or "us-east-1")
    endpoint = str(client.meta.endpoint_url)
    return session, None if endpoint.endswith("amazonaws.com") else endpoint, session.region_name or "us-east-1"


@_naming_the_url
def open_group(url: str, *, write: bool = False, complete: bool = False) -> zarr.Group:
    """An existing zarr v3 group.

    Args:
        url: where.
        write: open it for writing.
        complete: a chunk that is missing is an error when it is read, and not taken for fill values. Not for groups
            that were written by versions which left out such chunks.

    Raises:
        FileNotFoundError: there is none.
        UserError: here and when arrays are read: the storage refuses or cannot be reached, or an object is damaged.
    """
    store = GroupStore(_zarr_store(url, read_only=not write), url, complete=complete)
    return zarr.open_group(store, mode="r+" if write else "r", zarr_format=3)


@_naming_the_url
def create_group(url: str, attributes: dict[str, Any]) -> zarr.Group:
    """A new, empty zarr v3 group in place of whatever is at the URL."""
    delete(url)
    if not is_s3(url):
        _make_folder(Path(url))
    store = GroupStore(_zarr_store(url, read_only=False), url, complete=False)
    return zarr.create_group(store, zarr_format=3, attributes=attributes)
