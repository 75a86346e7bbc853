"""The objects of a zarr group, each checked when it is read.

zarr takes an object that is missing for fill values, and does not say which one is damaged. Ours are all written, those
of fill values too, and each ends with a checksum, so that what is lost can be told and named.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import LocalStore, ObjectStore, WrapperStore

from zoosplat.errors import UserError
from zoosplat.storage import writing
from zoosplat.storage.errors import is_answer, no_bucket

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

RESULTS = "results"
ABSENT = np.uint64(2**64 - 1)  # in a shard's table: a chunk that was not written

# So that absence always means loss. Here, as arrays take it from here when they are opened, and only then.
zarr.config.set({"array.write_empty_chunks": True})


def lost(url: str, what: str) -> UserError:
    """The error for a file of a result that is not what its stage wrote, such as "is missing"."""
    parts = url.split("/")
    # Results lie in PROJECT/results/<stage>/<result id>; groups from before they did tell no stage.
    stages = [
        f"stage {stage}" for folder, stage, _ in zip(parts, parts[1:], parts[2:], strict=False) if folder == RESULTS
    ]
    return UserError(f"{url} {what}; run {stages[-1] if stages else 'the stage that wrote it'} with --force")


class GroupStore(WrapperStore[Store]):
    """A group's folder or prefix, of which only whole objects are read.

    Attributes:
        url: of the group.
        complete: whether every chunk must be there. A group that is being written is not, nor is one that was written
            when chunks of fill values were left out; there, what is missing reads as fill values.

    Raises:
        UserError: when read, and naming the object: it is missing, cut short, or its checksum shows damage.
    """

    def __init__(self, store: Store, url: str, *, complete: bool) -> None:
        super().__init__(store)
        self.url, self.complete = url, complete
        # Arrays that were opened and whose chunks end with a checksum: chunks in a shard, 0 where there are no shards.
        self._chunks: dict[str, int] = {}

    def __str__(self) -> str:
        return self.url

    def _with_store(self, store: Store) -> GroupStore:
        return GroupStore(store, self.url, complete=self.complete)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            found = await self._store.get(key, prototype, byte_range)
        except Exception as error:
            if not is_answer(error) or _fits(byte_range, await self._store.getsize(key)):
                raise
            raise lost(f"{self.url}/{key}", "is cut short") from error
        array, _, chunk = key.partition("/c/")
        if not chunk:
            if found is not None and key.endswith("zarr.json"):
                self._learn(key, found.to_bytes())
            return found
        if found is None:
            if self.complete:
                raise lost(f"{self.url}/{key}", "is missing")
        elif array in self._chunks:
            n_chunks = 0 if byte_range is not None else self._chunks[array]
            if not _is_whole(found.as_numpy_array(), n_chunks):
                raise lost(f"{self.url}/{key}", "is damaged")
        return found

    async def set(self, key: str, value: Buffer) -> None:
        writing.check()
        if isinstance(self._store, LocalStore):
            await self._store.set(key, value)
            _written.append((self._store.root / key, self._store.root))
            return
        try:
            await self._store.set(key, value)
        except FileNotFoundError as error:
            raise no_bucket(self.url) from error

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        writing.check()
        await self._store.set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        writing.check()
        await self._store.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        writing.check()
        await self._store.delete_dir(prefix)

    def part(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes of an object, from `start` on; if that is negative, from so far before the end.

        They must end with their checksum. For many small reads from threads: zarr's own way through its event loop
        takes a millisecond of Python each.

        Raises:
            FileNotFoundError: there is no such object, in a group that need not be complete.
            UserError: it is missing, cut short or damaged.
        """
        try:
            data = _read_part(self._store, key, start, length)
        except FileNotFoundError:
            if not self.complete:
                raise
            raise lost(f"{self.url}/{key}", "is missing") from None
        except Exception as error:
            wanted: ByteRequest = SuffixByteRequest(-start) if start < 0 else RangeByteRequest(start, start + length)
            if not is_answer(error) or _fits(wanted, _size(self._store, key)):
                raise
            raise lost(f"{self.url}/{key}", "is cut short") from error
        if not _is_whole(np.frombuffer(data, np.uint8), 0):
            raise lost(f"{self.url}/{key}", "is damaged")
        return data

    def _learn(self, key: str, metadata: bytes) -> None:
        """How the objects of an array are checked."""
        try:
            described: dict[str, Any] = json.loads(metadata)
        except ValueError as error:
            raise lost(f"{self.url}/{key}", "is damaged") from error
        if described.get("node_type") != "array":
            return
        codecs, n_chunks = described["codecs"], 0
        if codecs[0]["name"] == "sharding_indexed":
            sharding = codecs[0]["configuration"]
            shard, chunk = described["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"]
            codecs, n_chunks = sharding["codecs"], math.prod(n // m for n, m in zip(shard, chunk, strict=True))
        if codecs[-1]["name"] == "crc32c":
            self._chunks[key.removesuffix("/zarr.json")] = n_chunks


# -- power cuts ---------------------------------------------------------------------------------------------------
SYNCED_AT_ONCE = 8  # a journal takes what is synced together in one go

_written: list[tuple[Path, Path]] = []  # files that this process has written to groups on disks, with their groups
_syncing = threading.Lock()


def sync_written() -> None:
    """Have on disk what this process has written to groups so far: before a mark says so.

    Not block by block, which took a second for a recording of 144 small frames where this takes a tenth.
    """
    with _syncing:
        written = _written.copy()
        files = {file for file, _ in written}
        # Of each file's folders those up to the one that the group lies in: it holds the mark too, or is lost with it.
        folders = {folder for file, group in written for folder in file.parents if folder.is_relative_to(group.parent)}
        if files:
            with ThreadPoolExecutor(SYNCED_AT_ONCE) as pool:
                list(pool.map(sync_path, files))
                list(pool.map(sync_path, folders))
        del _written[: len(written)]


def sync_path(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk. Nothing where it has been removed."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems know no such thing
            raise
    finally:
        os.close(opened)


def _read_part(store: Store, key: str, start: int, length: int) -> bytes:
    if isinstance(store, LocalStore):
        with open(store.root / key, "rb") as file:
            n = os.fstat(file.fileno()).st_size
            file.seek(max(0, n + start) if start < 0 else start)
            return file.read(length)
    import obstore

    assert isinstance(store, ObjectStore)
    if start < 0:
        return bytes(obstore.get(store.store, key, options={"range": {"suffix": -start}}).bytes())[:length]
    return bytes(obstore.get_range(store.store, key, start=start, length=length))


def _size(store: Store, key: str) -> int:
    import obstore

    assert isinstance(store, ObjectStore)
    return int(obstore.head(store.store, key)["size"])


def _fits(wanted: ByteRequest | None, n: int) -> bool:
    """Whether an object of n bytes has the range."""
    if isinstance(wanted, RangeByteRequest):
        return wanted.end <= n
    if isinstance(wanted, SuffixByteRequest):
        return wanted.suffix <= n
    return not isinstance(wanted, OffsetByteRequest) or wanted.offset < n


def _is_whole(data: npt.NDArray[np.uint8], n_chunks: int) -> bool:
    """Whether the checksums hold: of a chunk, of a shard's table, or of a whole shard of `n_chunks`."""
    table = data[-16 * n_chunks - 4 :] if n_chunks else data
    if len(table) < 4 or google_crc32c.value(table[:-4]) != int.from_bytes(table[-4:].tobytes(), "little"):
        return False
    if not n_chunks:
        return True
    places = np.frombuffer(table[:-4].tobytes(), "<u8").reshape(-1, 2)
    return all(_is_whole(data[int(at) : int(at + n)], 0) for at, n in places if at != ABSENT)
