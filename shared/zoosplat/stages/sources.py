"""Fingerprints of files outside a project: how they are taken, remembered, and when a remembered one still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zoosplat.stages.projects import RUNS, Project
from zoosplat.stages.results import Source
from zoosplat.storage import fingerprints, objects

SOURCES = "sources.json"  # In the folder of the runs: URL -> state and fingerprint of a file.


def refresh(source: Source, hashing: Callable[[str], None] = lambda url: None) -> Source:
    """A file as it is now. Its fingerprint is taken again only where its state says that it was written.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError: it is no longer there.
    """
    state = str(fingerprints.stat(source.url))
    if state == source.state:
        return source
    hashing(source.url)
    return Source(source.url, fingerprints.content_fingerprint(source.url), state)


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
        if source.state and fingerprints.is_settled(source.url)
    }
    if any(known.get(key) != value for key, value in found.items()):
        objects.write_json(url, {**known, **found})
