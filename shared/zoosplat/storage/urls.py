"""URLs of everything that zoosplat reads and writes: a local path, `file://...` or `s3://bucket/prefix`."""

from __future__ import annotations

import os

from zoosplat.errors import UserError

# Environment variable that forbids local paths. The runners set it in containers.
S3_ONLY = "ZOOSPLAT_S3_ONLY"


def normalize(url: str) -> str:
    """Absolute local path or `s3://bucket/prefix`, without a trailing slash.

    Raises:
        UserError: another scheme, an S3 URL without a bucket, `..` or control characters in an S3 URL, or a local path
            where ZOOSPLAT_S3_ONLY is set, as it is in containers: they hold nothing of the user's.
    """
    if is_s3(url):
        parts = url[5:].rstrip("/").split("/")
        if not parts[0] or ".." in parts or not url.isprintable():
            raise UserError(f"{url!a}: an S3 URL is s3://bucket/prefix, without '..' and control characters")
        return "s3://" + "/".join(parts)
    if url.startswith("file://"):
        url = url[7:]
    elif "://" in url:
        raise UserError(f"{url}: unknown kind of URL; use a folder or s3://bucket/prefix")
    check_local(url)
    return os.path.abspath(os.path.expanduser(url))


def check_local(url: str) -> None:
    """Raise UserError where local files must not be used.

    Every function that reads a local file calls this. A URL may come from the record of a run or the plan of a stage,
    which anyone who can write to the project can change.
    """
    if os.environ.get(S3_ONLY):
        raise UserError(f"{url}: stages in containers read and write S3 alone; use s3://bucket/prefix")


def is_s3(url: str) -> bool:
    """Whether a URL begins with `s3://`."""
    return url.startswith("s3://")


def split_s3(url: str) -> tuple[str, str]:
    """Bucket and key, or bucket and prefix, of a URL on S3. The key is empty for a whole bucket."""
    bucket, _, key = url[5:].partition("/")
    return bucket, key


def join(url: str, *parts: str) -> str:
    """A URL with further path parts, each separated by one slash."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])
