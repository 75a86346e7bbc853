"""Pictures in a folder that are numbered by frame, such as `masks/0/00000.png`, `masks/0/00001.png` and so on.

This module only lists files. It imports no decoder, because the fingerprints of such files are taken in every run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zoosplat.errors import UserError
from zoosplat.storage import listing, urls

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
# The part of a file name that stands for the number, as printf writes it: %d or %05d.
_PLACEHOLDER = re.compile(r"%(?:0(\d+))?d")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class NumberedPictures:
    """The pictures of a folder that belong together.

    Attributes:
        folder: URL of the folder.
        before, after: the parts of a file name round its number.
        digits: to which a number is filled up with zeros; 1 if it is not.
        versions: number -> token that changes whenever the file is written, ascending.
    """

    folder: str
    before: str
    after: str
    digits: int
    versions: Mapping[int, str]

    @property
    def pattern(self) -> str:
        """URL with a placeholder for the number, which `picture_url` fills in."""
        before, after = (part.replace("%", "%%") for part in (self.before, self.after))
        number = "%d" if self.digits == 1 else f"%0{self.digits}d"
        return urls.join(self.folder.replace("%", "%%"), f"{before}{number}{after}")

    def first_missing(self, step: int) -> int | None:
        """The first number that is not there, of those from the first to the last one at a distance of `step`."""
        numbers = list(self.versions)
        expected = range(numbers[0], numbers[-1] + 1, step)
        return next((n for n, there in zip(expected, numbers, strict=False) if n != there), None)


def picture_url(pattern: str, number: int) -> str:
    """URL of the picture with a number, see `NumberedPictures.pattern`."""
    return pattern % number


def is_pattern(name: str) -> bool:
    """Whether a name stands for numbered pictures, such as `masks/0/%05d.png`."""
    name = name.rpartition("/")[2]
    return name.lower().endswith(PICTURE_SUFFIXES) and _PLACEHOLDER.search(name) is not None


def find_pictures(url: str, label: str) -> NumberedPictures | None:
    """The numbered pictures of a folder, or those that a pattern names; None where there are none.

    Args:
        url: a folder, or a pattern in one.
        label: name of the entry in messages, such as `masks/0 (mask of camera 0)`.

    Raises:
        UserError: the names in the folder do not tell one number a picture.
    """
    if is_pattern(url):
        folder, _, name = url.rpartition("/")
        placeholder = _PLACEHOLDER.search(name)
        assert placeholder is not None
        before, after = name[: placeholder.start()], name[placeholder.end() :]
        digits = int(placeholder[1] or 1)
        names = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        there = listing.list_versions(folder)
        matches = ((names.fullmatch(name), version) for name, version in there.items())
        versions = {int(m[1]): v for m, v in matches if m and m[1] == f"{int(m[1]):0{digits}d}"}
        return NumberedPictures(folder, before, after, digits, dict(sorted(versions.items()))) if versions else None
    there = {
        name: version
        for name, version in listing.list_versions(url).items()
        # macOS puts a hidden file ._00000.png beside 00000.png on file systems of other kinds.
        if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
    }
    return _from_names(url, there, label) if there else None


def _from_names(folder: str, there: dict[str, str], label: str) -> NumberedPictures:
    """The pictures by their names, of whose groups of digits one counts and the others are the same in all names."""
    parts = {name: _DIGITS.split(name) for name in sorted(there)}
    first, *others = parts.values()
    texts = first[::2]
    for name, found in parts.items():
        if found[::2] != texts:
            numbered = next((each for each in (first, found) if len(each) > 1), ["", "00000", ".png"])
            raise UserError(
                f"{label}: the folder holds several series of pictures ({next(iter(parts))} and {name}); name one by "
                f"its pattern, such as {_example(numbered)}"
            )
    varying = [i for i in range(1, len(first), 2) if any(found[i] != first[i] for found in others)]
    if not varying and len(first) > 1:
        varying = [len(first) - 2]  # A single picture: its last number.
    if len(varying) != 1:
        what = "no number" if not varying else f"{len(varying)} numbers that differ"
        raise UserError(
            f"{label}: names such as {next(iter(parts))} hold {what}; each picture needs one number, that of its frame"
        )
    at = varying[0]
    before, after = "".join(first[:at]), "".join(first[at + 1 :])
    digits = min(len(found[at]) for found in parts.values())
    versions: dict[int, str] = {}
    for name, found in parts.items():
        number = int(found[at])
        if found[at] != f"{number:0{digits}d}":
            raise UserError(f"{label}: {name} has zeros before its number unlike others; rename the pictures alike")
        versions[number] = there[name]
    return NumberedPictures(folder, before, after, digits, dict(sorted(versions.items())))


def _example(parts: Iterable[str]) -> str:
    """A pattern for a name of these parts, of which the last but one is its number."""
    *before, number, after = parts
    digits = f"0{len(number)}" if len(number) > 1 else ""
    return f"{''.join(before)}%{digits}d{after}"
