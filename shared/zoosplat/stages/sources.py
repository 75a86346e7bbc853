"""Fingerprints of files outside a project: how they are taken, remembered, and when a remembered one still holds.

Numbered pictures in a folder, which hold the masks of a camera, count as one file. Their fingerprint is made from the
number and the content of each picture, so other files in the folder and the names round the numbers do not count.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable

from zoosplat.errors import TransientError, UserError
from zoosplat.recording.numbered_pictures import NumberedPictures, find_pictures, is_pattern, picture_url
from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.results import Source, json_digest
from zoosplat.storage import fingerprints, objects, urls

SOURCES = "sources.json"  # In the folder of the runs: URL -> state and fingerprint of a file.


def refresh(source: Source, hashing: Callable[[str], None] = lambda url: None) -> Source:
    """A file as it is now. Its fingerprint is taken again only where its state says that it was written.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError: it is no longer there.
    """
    pictures = _find_pictures(source.url)
    state = str(fingerprints.stat(source.url)) if pictures is None else json_digest(_versions(pictures))
    if state == source.state:
        return source
    hashing(source.url)
    content = fingerprints.content_fingerprint(source.url) if pictures is None else _fingerprint(pictures)
    return Source(source.url, content, state)


def _find_pictures(url: str) -> NumberedPictures | None:
    """The numbered pictures in a folder or of a pattern; None if the URL is of a file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no file, and there are no pictures that are numbered right. What
            is wrong with them is told by the check of the recording.
    """
    if not is_pattern(url):
        try:
            fingerprints.stat(url)
            return None
        except IsADirectoryError:
            pass
    try:
        pictures = find_pictures(url, url)
    except TransientError:
        raise
    except UserError:
        pictures = None
    if pictures is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return pictures


def _versions(pictures: NumberedPictures) -> dict[str, str]:
    return {str(number): version for number, version in pictures.versions.items()}


def _fingerprint(pictures: NumberedPictures) -> str:
    """Fingerprint of the contents of numbered pictures. On S3, the ETags of the listing name the contents."""
    if urls.is_s3(pictures.folder):
        return json_digest(_versions(pictures))
    contents = {n: fingerprints.content_fingerprint(picture_url(pictures.pattern, n)) for n in pictures.versions}
    return json_digest({str(number): content for number, content in contents.items()})


def _is_settled(url: str) -> bool:
    """Whether the state of a file, or of each numbered picture, would change if it were written now."""
    try:
        pictures = _find_pictures(url)
    except OSError:
        return False
    if pictures is None:
        return fingerprints.is_settled(url)
    if urls.is_s3(url):
        return True
    return all(fingerprints.is_settled(picture_url(pictures.pattern, number)) for number in pictures.versions)


class FingerprintCache:
    """Takes the fingerprints of files, and remembers those of files that a project has seen before.

    Args:
        project: whose memory is read.
        hashing: told the URL of each file whose content is about to be read.
    """

    def __init__(self, project: Project, hashing: Callable[[str], None] = lambda url: None) -> None:
        self._hashing = hashing
        remembered = objects.read_json(project.path(RUNS, SOURCES)) or {}
        self._known = {url: Source(url, entry["fingerprint"], entry["state"]) for url, entry in remembered.items()}

    def source(self, url: str) -> Source | None:
        """A file as it is now; as it was last known where it is gone; None where it was never known."""
        known = self._known.get(url)
        try:
            source = self._known[url] = refresh(known or Source(url, ""), self._hashing)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None if known is None else Source(url, known.fingerprint)
        return source


def remember(project: Project, sources: Iterable[Source]) -> None:
    """Keep the fingerprints of files, so that the next run of the project does not hash them again."""
    url = project.path(RUNS, SOURCES)
    known = objects.read_json(url) or {}
    found = {
        source.url: {"state": source.state, "fingerprint": source.fingerprint}
        for source in sources
        if source.state and _is_settled(source.url)
    }
    if any(known.get(key) != value for key, value in found.items()):
        objects.write_json(url, {**known, **found})
