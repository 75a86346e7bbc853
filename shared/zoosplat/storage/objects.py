"""Whole files of a file system and whole objects on S3: reading, writing and removing them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import IO, Any, cast

from zoosplat.errors import UserError
from zoosplat.storage import s3_client, writing
from zoosplat.storage.durability import make_folder, sync_path, sync_written
from zoosplat.storage.errors import name_url_in_errors
from zoosplat.storage.urls import check_local, is_s3, split_s3

# Bytes that a file on S3 reads ahead.
READ_AHEAD = 4 << 20


@name_url_in_errors
def read_bytes(url: str) -> bytes:
    """Whole content of a file. Raises FileNotFoundError where there is none."""
    if is_s3(url):
        return cast(bytes, s3_client.file_system().cat_file(url))
    check_local(url)
    return Path(url).read_bytes()


@name_url_in_errors
def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all: with one put on S3, and with a rename on a file system.

    On a file system, everything that this process has written to zarr groups before is synced to disk first. The file
    therefore survives a power cut only together with those groups.

    Raises:
        UserError: a file has the name of one of the folders above; or see `name_url_in_errors`.
    """
    writing.check()
    if is_s3(url):
        s3_client.file_system().pipe_file(url, data)
        return
    path = Path(url)
    try:
        make_folder(path.parent)
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


def encode_json(value: dict[str, Any]) -> bytes:
    """A JSON object as `write_json` writes it: indented by one space, with sorted keys."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def write_json(url: str, value: dict[str, Any]) -> None:
    """Write a JSON object as `write_bytes` does."""
    write_bytes(url, encode_json(value))


@name_url_in_errors
def exists(url: str) -> bool:
    """Whether there is a file or a folder."""
    if is_s3(url):
        return bool(s3_client.file_system().exists(url))
    return os.path.exists(url)


@name_url_in_errors
def open_read(url: str) -> IO[bytes]:
    """A seekable binary file for reading. On S3 it reads ahead in blocks of 4 MiB."""
    if is_s3(url):
        opened = s3_client.file_system().open(url, "rb", block_size=READ_AHEAD, cache_type="readahead")
        return cast(IO[bytes], opened)
    check_local(url)
    return open(url, "rb")


@name_url_in_errors
def size(url: str) -> int:
    """Size of a file in bytes. Raises FileNotFoundError where there is none."""
    if is_s3(url):
        return int(s3_client.file_system().info(url)["size"])
    return os.path.getsize(url)


@name_url_in_errors
def delete(url: str) -> None:
    """Remove a file, or everything below a URL. It is no error if there is nothing."""
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
    """Remove the objects below a URL on S3.

    `rm` of s3fs takes `*`, `?` and `[` of a URL for patterns, and it hides the errors of objects that it may not
    delete.
    """
    from botocore.exceptions import ClientError

    bucket, _ = split_s3(url)
    keys = [name[len(bucket) + 1 :] for name in s3_client.file_system().find(url)]
    for i in range(0, len(keys), s3_client.KEYS_AT_ONCE):
        to_delete = {"Objects": [{"Key": key} for key in keys[i : i + s3_client.KEYS_AT_ONCE]], "Quiet": True}
        answer = s3_client.call("delete_objects", Bucket=bucket, Delete=to_delete)
        for failed in answer.get("Errors", []):
            # The answer as a whole has status 200. A request for this object alone would have had this status.
            status = 403 if failed["Code"] == "AccessDenied" else 500
            raise ClientError({"Error": failed, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")


def remove_partials(url: str) -> None:
    """Remove the `.partial` files that a killed writer left beside or below a local path.

    On S3 there are none, because a put is atomic.
    """
    if not is_s3(url):
        target = Path(url)
        for path in [*target.parent.glob(f"{target.name}.*.partial"), *target.rglob("*.partial")]:
            path.unlink(missing_ok=True)
