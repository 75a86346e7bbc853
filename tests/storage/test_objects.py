"""Files and folders, on disks and on S3: listings, sizes, versions, identities of contents."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoosplat.errors import UserError
from zoosplat.storage import fingerprints, listing, objects, s3_client, urls

if TYPE_CHECKING:
    from tests.conftest import S3


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, s3_here: S3, tmp_path: Path) -> str:
    """URL of an empty folder."""
    return str(tmp_path / "lab") if request.param == "disk" else f"s3://{s3_here.bucket()}/lab"


# -- identity of contents -----------------------------------------------------------------------------------------
def test_equal_contents_have_equal_fingerprints_everywhere(s3_here: S3, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    local, remote = str(tmp_path / "video.mp4"), f"s3://{s3_here.bucket()}/data/video.mp4"
    for url in (local, remote):
        objects.write_bytes(url, data)
    expected = hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert fingerprints.content_fingerprint(local) == fingerprints.content_fingerprint(remote) == expected
    objects.write_bytes(remote, data[:-1] + b"?")
    assert fingerprints.content_fingerprint(remote) != expected


def test_a_fingerprint_of_an_object_in_parts(s3_here: S3) -> None:
    """Its ETag is not the MD5 of its content, but changes with it."""
    found = []
    for part in (b"a", b"b"):
        url = f"s3://{s3_here.bucket()}/parts"
        bucket, key = url[5:].split("/")
        upload = s3_here.client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        parts = []
        for number, body in ((1, b"x" * (5 << 20)), (2, part)):
            answer = s3_here.client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        s3_here.client.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
        )
        found.append(fingerprints.content_fingerprint(url))
    assert found[0] != found[1]
    assert '"' not in found[0]


def test_no_fingerprint_of_a_folder_or_of_nothing(place: str) -> None:
    objects.write_bytes(urls.join(place, "images", "0.png"), b"picture")
    with pytest.raises(IsADirectoryError):
        fingerprints.content_fingerprint(urls.join(place, "images"))
    with pytest.raises(IsADirectoryError):
        fingerprints.stat(urls.join(place, "images"))
    for name in ("none", "images/none"):
        with pytest.raises(FileNotFoundError):
            fingerprints.content_fingerprint(urls.join(place, name))
        with pytest.raises(FileNotFoundError):
            fingerprints.stat(urls.join(place, name))


def test_a_byte_in_the_middle_counts_though_size_and_time_are_set_back(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    path = tmp_path / "mask.mp4"
    path.write_bytes(bytes(1 << 20))
    time.sleep(0.05)  # longer than a tick of the file system's clock
    before, cache = path.stat(), dict[str, Any]()
    old, version = fingerprints.content_fingerprint(str(path), cache), fingerprints.stat(str(path))
    assert list(cache) == [str(path)]
    with path.open("r+b") as file:
        file.seek(1 << 19)
        file.write(b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert fingerprints.content_fingerprint(str(path), cache) != old
    assert fingerprints.stat(str(path)) != version


def test_a_fingerprint_is_taken_once(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"frames")
    cache: dict[str, Any] = {}
    found = fingerprints.content_fingerprint(str(path), cache)
    assert cache == {}, "it may be written again within the same tick of the clock"
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    time.sleep(0.05)
    fingerprints.content_fingerprint(str(path), cache)
    cache[str(path)][-1] = "remembered"
    assert fingerprints.content_fingerprint(str(path), cache) == "remembered"
    assert fingerprints.content_fingerprint(str(path)) == found


def test_a_file_that_grows_has_no_fingerprint(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"frames")

    class Growing:
        """Stands for MD5; meanwhile a camera writes on."""

        def __init__(self, **_: Any) -> None:
            with path.open("ab") as file:
                file.write(b"more")

        def update(self, data: bytes) -> None:
            pass

    monkeypatch.setattr(hashlib, "md5", Growing)
    with pytest.raises(UserError, match=r"video.mp4: is being written; run again when it is complete"):
        fingerprints.content_fingerprint(str(path))


# -- listings -----------------------------------------------------------------------------------------------------
def test_listings(place: str) -> None:
    assert (listing.manifest(place), listing.list_folders(place), list(listing.list_files(place))) == ({}, [], [])
    sizes = {"a.zarr/c/0": 3, "a.zarr/zarr.json": 2, "a.zarr.json": 0, "b [1]/x*.json": 1, "b [1]/d/e/f": 4}
    for name, n in sizes.items():
        objects.write_bytes(urls.join(place, name), bytes(n))
    objects.write_bytes(f"{place} neighbour/x", b"not ours")
    assert listing.manifest(place) == sizes
    assert list(listing.manifest(place)) == list(listing.list_files(place)) == sorted(sizes)
    assert listing.list_folders(place) == ["a.zarr", "b [1]"]
    assert listing.list_folders(urls.join(place, "b [1]")) == ["d"]
    assert listing.list_folders(urls.join(place, "b [1]", "d", "e")) == []
    file = urls.join(place, "a.zarr/c/0")
    assert fingerprints.stat(file)[0] == 3
    assert (listing.manifest(file), list(listing.list_files(file))) == ({"": 3}, [])
    listing.check_manifest(file, {"": 3})
    with pytest.raises(UserError, match=r"a.zarr/c/0 is damaged: 3 bytes instead of 4; run the stage that wrote it"):
        listing.check_manifest(file, {"": 4})


def test_a_listing_of_several_answers(s3_here: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "KEYS_AT_ONCE", 3)
    bucket = s3_here.bucket()
    for i in range(7):
        s3_here.client.put_object(Bucket=bucket, Key=f"p/{i:04d}/x", Body=b"12")
    s3_here.client.put_object(Bucket=bucket, Key="p/made by a console/", Body=b"")
    expected = {f"{i:04d}/x": 2 for i in range(7)}
    assert listing.manifest(f"s3://{bucket}/p") == expected
    assert listing.list_folders(f"s3://{bucket}/p") == [*(name[:4] for name in expected), "made by a console"]
    assert listing.list_folders(f"s3://{bucket}") == ["p"]


def test_links_are_followed_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "disk" / "x").mkdir(parents=True)
    (tmp_path / "disk" / "x" / "file").write_bytes(b"1")
    (tmp_path / "project").symlink_to("disk", target_is_directory=True)
    (tmp_path / "disk" / "nowhere").symlink_to("gone")
    assert listing.manifest(str(tmp_path / "project")) == {"x/file": 1}
    assert listing.list_folders(str(tmp_path / "project")) == ["x"]
