"""zarr groups at a URL, whose objects are checked when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from zoosplat.storage import s3_client
from zoosplat.storage.durability import make_folder
from zoosplat.storage.errors import name_url_in_errors
from zoosplat.storage.group_store import GroupStore
from zoosplat.storage.objects import delete
from zoosplat.storage.urls import check_local, is_s3


@name_url_in_errors
def open_group(url: str, *, write: bool = False, complete: bool = False) -> zarr.Group:
    """An existing group in zarr format 3.

    Args:
        url: folder or prefix of the group.
        write: whether it is opened for writing too.
        complete: whether a missing chunk is an error when it is read, instead of fill values. It must be False for
            groups of versions that left out chunks of fill values.

    Raises:
        FileNotFoundError: there is none.
        UserError: here and when arrays are read: the storage refuses or cannot be reached, or an object is damaged.
    """
    store = GroupStore(_array_store(url, read_only=not write), url, complete=complete)
    return zarr.open_group(store, mode="r+" if write else "r", zarr_format=3)


@name_url_in_errors
def create_group(url: str, attributes: dict[str, Any]) -> zarr.Group:
    """A new, empty group in zarr format 3, in place of whatever is at the URL."""
    delete(url)
    if not is_s3(url):
        make_folder(Path(url))
    store = GroupStore(_array_store(url, read_only=False), url, complete=False)
    return zarr.create_group(store, zarr_format=3, attributes=attributes)


def _array_store(url: str, *, read_only: bool) -> Store:
    if is_s3(url):
        return s3_client.array_store(url, read_only=read_only)
    check_local(url)
    return LocalStore(url, read_only=read_only)


def read_part(store: Store, key: str, start: int, length: int) -> bytes:
    """Part of an object of a group's store, see `GroupStore.read_part`."""
    assert isinstance(store, GroupStore)
    return store.read_part(key, start, length)
