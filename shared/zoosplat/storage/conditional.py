"""Writes that happen only if a file is absent or unchanged, so that processes do not overwrite each other's."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any

from zoosplat.storage import s3_client, writing
from zoosplat.storage.errors import name_url_in_errors
from zoosplat.storage.objects import encode_json, exists, read_bytes, write_json
from zoosplat.storage.urls import is_s3, split_s3


def create_json(url: str, value: dict[str, Any]) -> bool:
    """Write a JSON object unless the file exists, and return whether this call has written it.

    On S3 two processes never both write it. On a file system they could, so the caller must hold a lock.
    """
    if not is_s3(url):
        if exists(url):
            return False
        write_json(url, value)
        return True
    writing.check()
    data = encode_json(value)
    # The object that is there may come from this very call, if the answer to its first attempt was lost.
    return put_if(url, data, None) is not None or read_bytes(url) == data


@name_url_in_errors
def etag(url: str) -> str:
    """ETag of an object on S3. Raises FileNotFoundError."""
    return str(s3_client.file_system().info(url)["ETag"])


@name_url_in_errors
def age(url: str) -> float:
    """Whole seconds since an object on S3 was written, by the server's own clock. Raises FileNotFoundError."""
    bucket, key = split_s3(url)
    answer = s3_client.call("head_object", Bucket=bucket, Key=key)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


@name_url_in_errors
def put_if(url: str, data: bytes, etag: str | None) -> str | None:
    """Write an object on S3 only if the present one has this ETag; with None, only if there is no object.

    Returns:
        The ETag of the new object, or None if another object was there first. That other object may come from this very
        call: a request whose answer was lost is sent again, and then it finds the object of its first attempt.
    """
    condition = {"mode": "create"} if etag is None else {"IfMatch": etag}
    try:
        return str(s3_client.file_system().pipe_file(url, data, **condition)["ETag"])
    except OSError as error:
        gone = ("NoSuchKey",) if etag is not None else ()
        if _s3_code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", *gone):
            return None
        raise


def _s3_code(error: BaseException) -> str:
    """S3's code in an error that s3fs has translated, such as "NoSuchKey"; empty where there is none."""
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@name_url_in_errors
def delete_if(url: str, etag: str) -> None:
    """Remove an object on S3 only if it has this ETag.

    The request is not retried: a second one could meet an object that another process has put there. MinIO ignores the
    ETag.
    """
    from fsspec import asyn

    bucket, key = split_s3(url)

    async def send() -> None:
        await s3_client.file_system().set_session()
        client = await s3_client.file_system().get_s3(bucket)
        await client.delete_object(Bucket=bucket, Key=key, IfMatch=etag)

    asyn.sync(s3_client.file_system().loop, send)
