"""Versions and fingerprints of files, which tell whether a file was written again and whether its content changed."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from stat import S_ISDIR
from typing import Any

from zoosplat.errors import UserError
from zoosplat.storage import s3_client
from zoosplat.storage.errors import name_url_in_errors
from zoosplat.storage.objects import open_read, size
from zoosplat.storage.urls import is_s3

# Bytes that are read and hashed in one go.
HASHED_AT_ONCE = 4 << 20
# Resolution in ns of the coarsest clock of a file system, which is FAT's. Two writes within it have the same time.
SETTLED_NS = 2_000_000_000


@name_url_in_errors
def stat(url: str) -> tuple[int, str]:
    """Size in bytes of a file, and a token that changes whenever the file is written.

    Returns:
        The size; on S3 the ETag, on a file system the times of the last change and the inode.

    Raises:
        FileNotFoundError: there is nothing.
        IsADirectoryError: it is a folder.
    """
    if is_s3(url):
        found = s3_client.file_system().info(url)
        if found["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
        return int(found["size"]), str(found["ETag"]).strip('"')
    n, *version = _local_version(os.stat(url), url)
    return n, "-".join(str(part) for part in version)


def _local_version(status: os.stat_result, url: str) -> list[int]:
    """Size, mtime in ns, ctime in ns and inode of a local file. ctime changes even if a program sets mtime back."""
    if S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@name_url_in_errors
def content_fingerprint(url: str, cache: dict[str, Any] | None = None) -> str:
    """Fingerprint of a file's whole content: its MD5 in hexadecimal, which is also the ETag of an object on S3.

    The ETag of an object that was uploaded in several parts is no MD5, but it changes with the content all the same.

    Args:
        url: a file.
        cache: fingerprints of local files that were read before. Fingerprints that are computed now are added. It holds
            JSON values: `{path: [size, mtime_ns, ctime_ns, inode, fingerprint]}`. None reads the file in any case.

    Raises:
        FileNotFoundError: there is nothing.
        IsADirectoryError: it is a folder.
        UserError: the file is being written, or cannot be read.
    """
    if is_s3(url):
        return stat(url)[1]
    with open(url, "rb") as file:
        version = _local_version(os.fstat(file.fileno()), url)
        known = (cache or {}).get(url)
        if known is not None and list(known[:-1]) == version:
            return str(known[-1])
        digest = hashlib.md5(usedforsecurity=False)
        while data := file.read(HASHED_AT_ONCE):
            digest.update(data)
        if _local_version(os.fstat(file.fileno()), url) != version:
            raise UserError(f"{url}: is being written; run again when it is complete")
    # A file that is written again within the clock's resolution keeps its version, so a recent one is not cached.
    if cache is not None and time.time_ns() - version[2] > SETTLED_NS:
        cache[url] = [*version, digest.hexdigest()]
    return digest.hexdigest()


def is_settled(url: str) -> bool:
    """Whether the token of `stat` would change if the file were written now.

    It would not if the last change of a local file lies within the resolution of the file system's clock.
    """
    if is_s3(url):
        return True
    try:
        return time.time_ns() - os.stat(url).st_ctime_ns > SETTLED_NS
    except OSError:
        return False


@name_url_in_errors
def legacy_fingerprint(url: str) -> str:
    """Fingerprint in projects of the first layout: SHA-256 of a file's size, first 64 KiB and last 64 KiB."""
    n = size(url)
    with open_read(url) as file:
        head = file.read(1 << 16)
        file.seek(max(0, n - (1 << 16)))
        tail = file.read()
    return hashlib.sha256(b"%d\n" % n + head + tail).hexdigest()
