"""YAML 1.2 and JSON: strict reading, and writing that is read back equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from zoosplat.errors import UserError

_TAG = "tag:yaml.org,2002:"
_DIGIT = list("-+.0123456789")
# These patterns say what a plain scalar is by the core schema of YAML 1.2, with one exception: a whole number that
# begins with zeros is text here. YAML 1.1 reads 0100 as octal, 1:30 as 90, 1_0 as 10, yes as true and 1e-4 as text.
# Where a person may have meant either, the scalar stays text as it is written: a key that wants text gets it, and a key
# that wants a number refuses it.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_MERGE = re.compile(r"<<\Z")
MAX_DIGITS = 1000  # Of a number. Python's conversion takes time that grows with the square of the digits.


class _Loader(yaml.SafeLoader):
    """YAML's own kinds of values, as version 1.2 reads them, and merge keys; no other tag has a meaning."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag in {None, *(_TAG + kind for kind in ("str", "seq", "map"))}
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        # Merge keys (<<) copy what they merge, so a few levels of aliases would fill the memory; one copy is enough.
        latest = {k.value if isinstance(k, yaml.ScalarNode) else id(k): (k, v) for k, v in node.value}
        node.value = list(latest.values())


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read_int(text: str) -> int:
    return int(text, 16) if "x" in text else int(text.replace("o", ""), 8) if "o" in text else int(text)


def _read_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _constructor(
    kind: str, pattern: re.Pattern[str], read: Callable[[str], Any]
) -> Callable[[_Loader, yaml.Node], Any]:
    def construct(loader: _Loader, node: yaml.Node) -> Any:
        text = loader.construct_scalar(node)  # type: ignore[arg-type]
        if len(text) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(problem="a number of too many digits", problem_mark=node.start_mark)
        if not pattern.match(text):  # An explicit tag, such as !!int 0100, does not ask the pattern first.
            raise yaml.MarkedYAMLError(problem=f"{text!r} is no {kind} of YAML 1.2", problem_mark=node.start_mark)
        return read(text)

    return construct


_KINDS: tuple[tuple[str, re.Pattern[str], list[str], Callable[[str], Any]], ...] = (
    ("null", _NULL, ["~", "n", "N", ""], lambda text: None),
    ("bool", _BOOL, list("tTfF"), lambda text: text.lower() == "true"),
    ("int", _INT, _DIGIT, _read_int),
    ("float", _FLOAT, _DIGIT, _read_float),
)
for _kind, _pattern, _first, _read in _KINDS:
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    _Loader.add_constructor(_TAG + _kind, _constructor(_kind, _pattern, _read))
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _first)
# As a key of a mapping, << merges another mapping into that one; anywhere else it is text.
_Loader.add_implicit_resolver(_TAG + "merge", _MERGE, ["<"])
_Loader.add_constructor(_TAG + "merge", _constructor("merge key", _MERGE, str))
# Text like this is quoted, because other programs may read it: those of YAML 1.2 read 0100 as a hundred, and some of
# YAML 1.1 read y and n as true and false.
_Dumper.add_implicit_resolver(_TAG + "int", re.compile(r"[-+]?[0-9]+\Z"), _DIGIT)
_Dumper.add_implicit_resolver(_TAG + "bool", re.compile(r"[yYnN]\Z"), list("yYnN"))


def dump(value: Any, *, default_flow_style: bool) -> str:
    """YAML of a plain value, which `parse_yaml` reads back equal; in braces if `default_flow_style`."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=default_flow_style
    )
    return text


def parse_yaml(text: str) -> Any:
    """The plain value of a YAML 1.2 text. Raises UserError with the line where it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"not valid YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None


def parse_json(text: str) -> Any:
    """The plain value of a JSON text. Raises UserError where it is not valid or a key stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key} is given twice")
            seen.add(key)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from None


def nest_dotted_keys(raw: dict[Any, Any]) -> dict[Any, Any]:
    """A configuration whose dotted keys, `crop.grid_size: 256`, are read as keys of their sections.

    They may stand at the top and in a section. The given mappings, which YAML's aliases may share, are not changed.

    Raises:
        UserError: a key is given twice, or a section has a value of its own besides.
    """
    whole: dict[Any, Any] = {}
    for key, value in raw.items():
        path = _split_key(key)
        if not isinstance(value, dict) or not value:
            _set_nested(whole, path, value)
        else:
            for inner, inside in value.items():
                _set_nested(whole, path + _split_key(inner), inside)
    return whole


def _split_key(key: Any) -> list[Any]:
    parts = key.split(".") if isinstance(key, str) else [key]
    return parts if all(parts) else [key]


def _set_nested(whole: dict[Any, Any], path: list[Any], value: Any) -> None:
    *sections, leaf = path
    for depth, section in enumerate(sections, 1):
        whole = whole.setdefault(section, {})
        if not isinstance(whole, dict):
            outer = _dotted(path[:depth])
            raise UserError(f"{_dotted(path)}: {outer} is given a value of its own as well; keep one of them")
    if leaf not in whole:
        whole[leaf] = dict(value) if isinstance(value, dict) else value
    elif value != {} or not isinstance(whole[leaf], dict):
        raise UserError(f"{_dotted(path)} is given twice, once with dots and once in its section; keep one of them")


def _dotted(path: list[Any]) -> str:
    return ".".join(str(part) for part in path)


# -- text that looks like a number --------------------------------------------------------------------------------
_LEADING_ZEROS = re.compile(r"([-+]?)0+([0-9]+)\Z")
_SEXAGESIMAL = re.compile(r"([-+]?)([0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?)\Z")
_OTHER_BASES = re.compile(r"([-+]?)(0b[01]+|0x[0-9a-fA-F]+|0o[0-7]+)\Z")
_MAX_LENGTH = 40  # Characters: longer text is not meant to be a number.


def suggest_number(text: str) -> str | None:
    """What to write instead of text that looks like a number and is none by YAML 1.2; None: it looks like none.

    `0100` -> `100 (decimal) or 0o100 (octal: 64)`, `1:30` -> `90 (1:30 in sixties)`, `1_000` -> `1000`, `0b11` -> `3`.
    """
    plain = text.replace("_", "")
    if len(text) > _MAX_LENGTH:
        return None
    if found := _LEADING_ZEROS.match(plain):
        sign, digits = found.groups()
        decimal = str(int(sign + digits))
        if sign or len(digits) < 2 or not set(digits) <= set("01234567"):
            return decimal
        return f"{decimal} (decimal) or 0o{digits} (octal: {int(digits, 8)})"
    if found := _SEXAGESIMAL.match(plain):
        value: float = 0
        for part in found[2].split(":"):
            value = 60 * value + (float(part) if "." in part else int(part))
        return f"{found[1].strip('+')}{value:.15g} ({text} in sixties)"
    if found := _OTHER_BASES.match(plain):
        return str(int(found[1] + found[2], 0))
    return plain if plain != text and (_INT.match(plain) or _FLOAT.match(plain)) else None
