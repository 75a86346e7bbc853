"""Where a path leads that stands in a configuration file."""

from __future__ import annotations

import os
import posixpath

from zoosplat.errors import UserError
from zoosplat.storage import urls


def resolve_path(folder: str, name: str) -> str:
    """Where a path that was written in `folder` leads: an absolute local path or an s3:// URL.

    Raises:
        UserError: an unknown kind of URL, or a relative path that leaves its bucket.
    """
    if "://" in name or name.startswith(("/", "~")):
        return urls.normalize(name)
    if not urls.is_s3(folder):
        return os.path.normpath(os.path.join(folder, name))
    bucket, _, prefix = folder[5:].partition("/")
    path = posixpath.normpath(posixpath.join(prefix, name))
    if path.split("/")[0] == "..":
        raise UserError(f"{name}: leads out of the bucket {bucket}; name a folder inside it or a whole URL")
    return urls.normalize(f"s3://{bucket}/{'' if path == '.' else path}")
