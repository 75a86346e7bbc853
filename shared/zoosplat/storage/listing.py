"""Listings of what lies below a URL: names of files, names of folders, and manifests of names with sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from zoosplat.storage import s3_client
from zoosplat.storage.errors import damaged_result_error, name_url_in_errors
from zoosplat.storage.fingerprints import stat
from zoosplat.storage.urls import is_s3, join, split_s3


@name_url_in_errors
def manifest(url: str) -> dict[str, int]:
    """Size in bytes of every file below a URL, keyed by its path relative to the URL, sorted.

    For a file it is the size keyed by the empty path. Where there is nothing it is empty.
    """
    found: dict[str, int] = {}
    if is_s3(url):
        for page in s3_client.list_pages(url):
            prefix = page.get("Prefix", "")
            # Web consoles represent a folder by an empty object whose name ends in "/".
            objects = (each for each in page.get("Contents", []) if not each["Key"].endswith("/"))
            found |= {each["Key"][len(prefix) :]: int(each["Size"]) for each in objects}
    else:
        for folder, _, names in os.walk(url, onerror=_raise_unless_absent):
            for name in names:
                path = os.path.join(folder, name)
                # A dangling link is no file, and a file may be removed while this runs.
                with suppress(FileNotFoundError):
                    found[os.path.relpath(path, url).replace(os.sep, "/")] = os.stat(path).st_size
    if not found:
        with suppress(FileNotFoundError, IsADirectoryError):
            return {"": stat(url)[0]}
    return dict(sorted(found.items()))


def check_manifest(url: str, expected: dict[str, int]) -> None:
    """Compare the files below a URL with an earlier manifest. Further files are ignored.

    Results of earlier versions have a slash behind the names of files that lie beside a group.

    Raises:
        UserError: naming the first file that is missing or has another size.
    """
    found = manifest(url)
    for name, n in sorted((name.rstrip("/"), n) for name, n in expected.items()):
        where = join(url, name).rstrip("/")
        if name not in found:
            raise damaged_result_error(where, "is missing")
        if found[name] != n:
            raise damaged_result_error(where, f"is damaged: {found[name]} bytes instead of {n}")


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def list_files(url: str) -> Iterator[str]:
    """Every file below a URL, as paths relative to it, sorted."""
    yield from (name for name in manifest(url) if name)


@name_url_in_errors
def list_folders(url: str) -> list[str]:
    """Names of the folders directly below a URL, sorted; none where there is nothing. It is one request on S3."""
    if is_s3(url):
        pages = s3_client.list_pages(url, Delimiter="/")
        return sorted(
            p["Prefix"].rstrip("/").rpartition("/")[2] for page in pages for p in page.get("CommonPrefixes", [])
        )
    try:
        with os.scandir(url) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []


@name_url_in_errors
def list_names(url: str) -> list[str]:
    """Names of the files and folders directly below a URL, sorted; none where there is no such folder."""
    if not is_s3(url):
        return sorted(os.listdir(url)) if os.path.isdir(url) else []
    found = set[str]()
    for page in s3_client.list_pages(url, Delimiter="/"):
        keys = [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
        keys += [entry["Key"] for entry in page.get("Contents", [])]
        found |= {key.rstrip("/").rpartition("/")[2] for key in keys if key != page["Prefix"]}
    return sorted(found)


@name_url_in_errors
def list_versions(url: str) -> dict[str, str]:
    """The files directly below a URL: name -> token that changes whenever the file is written; sorted by name.

    The token is the ETag on S3, which also names the content. On a file system it tells the size, the times of the last
    change and the inode. Where there is no such folder, nothing is listed.
    """
    found: dict[str, str] = {}
    if is_s3(url):
        for page in s3_client.list_pages(url, Delimiter="/"):
            prefix = page.get("Prefix", "")
            files = (each for each in page.get("Contents", []) if not each["Key"].endswith("/"))
            found |= {each["Key"][len(prefix) :]: str(each["ETag"]).strip('"') for each in files}
    elif os.path.isdir(url):
        for name in os.listdir(url):
            # A file may be removed while this runs, a link may dangle, and folders are not listed.
            with suppress(FileNotFoundError, IsADirectoryError):
                n, version = stat(join(url, name))
                found[name] = f"{n}-{version}"
    return dict(sorted(found.items()))


@name_url_in_errors
def first_file(url: str) -> str | None:
    """One file below a URL, as a path relative to it; empty if the URL is a file itself, None if there is nothing.

    It takes no longer where there are many files. A symbolic link to a folder counts as a file.
    """
    if is_s3(url):
        bucket, key = split_s3(url.rstrip("/"))
        keys = [str(entry["Key"]) for entry in next(s3_client.list_pages(url)).get("Contents", [])]
        # Web consoles represent a folder by an empty object whose name ends in "/".
        keys = [name for name in keys if not name.endswith("/")]
        if keys:
            return keys[0].removeprefix(f"{key}/")
        # Keys are listed in order, so a key that equals the prefix comes first.
        same = s3_client.call("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        return "" if same and same[0]["Key"] == key else None
    if not os.path.isdir(url):
        return "" if os.path.lexists(url) else None
    for folder, folders, files in os.walk(url):
        folders.sort()
        files += [name for name in folders if os.path.islink(os.path.join(folder, name))]
        if files:
            return os.path.relpath(os.path.join(folder, min(files)), url)
    return None
