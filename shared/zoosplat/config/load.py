"""Reading a configuration: native YAML, the JSON of the published tool (arXiv 2505.18342), and overrides.

Whatever is wrong is reported together, a line each, naming the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zoosplat.config.classic import classic_project_directory, is_classic, native_from_classic, parse_classic
from zoosplat.config.experiment import Experiment
from zoosplat.config.paths import resolve_path
from zoosplat.config.sections import is_weights_file, is_weights_folder
from zoosplat.config.serialization import nest_dotted_keys, parse_json, parse_yaml
from zoosplat.config.training import is_own_weights
from zoosplat.errors import UserError
from zoosplat.storage import objects, urls
from zoosplat.storage.errors import as_user_error

MAX_BYTES = 1 << 20  # A larger file is taken for something else than a configuration, such as a video.


def _always(value: str) -> bool:
    return True


# Section (None: the top), key, and which values of it are paths, relative to the configuration's folder.
PATH_KEYS: tuple[tuple[str | None, str, Callable[[str], bool]], ...] = (
    ("data", "directory", _always),
    (None, "reuse", _always),
    ("train", "start_from", is_own_weights),
    ("dynamic", "initial_ply", _always),
    ("dynamic", "start_checkpoint", _always),
    ("segment", "sam_weights", is_weights_folder),
    ("features", "weights", is_weights_file),
)


class Loaded(NamedTuple):
    """A configuration as it was read.

    Attributes:
        experiment: What it configures.
        notes: For a classic file, a line for each key that has no effect or got a notable default.
        project: For a classic file, the URL of the project that it names; otherwise None.
    """

    experiment: Experiment
    notes: list[str]
    project: str | None


def read_config(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read native YAML or classic JSON from a local path or s3:// URL.

    Args:
        path: the file; relative directories in it are resolved against its folder.
        overrides: `section.key=value`, the value in YAML; names of the native sections, also for classic files.

    Raises:
        UserError: a line for each problem, naming the key, the value and what is valid.
    """
    return load_config(path, overrides).experiment


def load_config(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """Do the same as `read_config`, and return also what a classic file says besides the experiment."""
    url = urls.normalize(path)
    folder = url.rpartition("/")[0] or "/"
    try:
        return _load(_read_text(url), folder, overrides)
    except UserError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _read_text(url: str) -> str:
    try:
        data = objects.read_bytes(url)
    except FileNotFoundError:
        raise UserError("no such file; give a .yaml or a classic .json configuration") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError("is a folder; give a .yaml or a classic .json configuration") from None
    except Exception as error:
        raise as_user_error(error, url) or error from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{len(data)} bytes are too many for a configuration; give a .yaml or .json file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not text in UTF-8; give a .yaml or a classic .json configuration") from None
    return text


def _load(text: str, folder: str, overrides: Sequence[str]) -> Loaded:
    # The content tells the format, because a classic file may be called anything. YAML would read JSON too, but
    # parse_json explains errors better.
    raw = parse_json(text) if text.lstrip().startswith("{") else parse_yaml(text)
    if not isinstance(raw, dict):
        raise UserError("must be a mapping of keys to values")
    if is_classic(raw):
        if not overrides:
            return Loaded(*parse_classic(raw, folder), classic_project_directory(raw, folder))
        # Overrides are applied before the check, because they may mend what it would refuse.
        native, notes = native_from_classic(raw, folder)
        project = classic_project_directory(raw, folder)
    else:
        native, notes, project = nest_dotted_keys(raw), [], None
    for override in overrides:
        apply_override(native, override)
    _resolve_paths(native, folder)
    return Loaded(Experiment.from_raw(native), notes, project)


def _resolve_paths(native: dict[str, Any], folder: str) -> None:
    """Make the paths in a configuration absolute, in place. What is no valid value is left to the check after this."""
    for name, key, is_path in PATH_KEYS:
        section = native if name is None else native.get(name)
        written = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(written, str) and written.strip() and is_path(written):
            section[key] = resolve_path(folder, written)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one key of a raw configuration, in place, as the option `--set` writes it: `section.key=value`.

    Raises:
        UserError: the override is not written so, its value is no YAML, or its section has a plain value.
    """
    key, equals, text = override.partition("=")
    *sections, leaf = key.strip().split(".")
    if not equals or not leaf:
        raise UserError(f"--set {override}: write section.key=value, for example train.lr=1e-4")
    for section in sections:
        inner = raw.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {section} is not a section")
        raw[section] = dict(inner)  # A copy, because sections may be shared by YAML's aliases.
        raw = raw[section]
    try:
        raw[leaf] = parse_yaml(text)
    except UserError as error:
        raise UserError(f"--set {override}: {error}") from None
