"""YAML and JSON of configurations: strict reading, and writing that reads back equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from zoosplat.errors import UserError

_TAG = "tag:yaml.org,2002:"
_DIGIT = list("-+.0123456789")
# What a plain scalar is by YAML 1.2 (its core schema), but for a whole number that begins with zeros. YAML 1.1 takes
# that for octal, 1:30 for 90, 1_0 for 10, yes for true and 1e-4 for text; where a person may have meant either, the
# scalar stays text, as it is written: a key that wants text gets it, and one that wants a number refuses it.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_MERGE = re.compile(r"<<\Z")
MAX_DIGITS = 1000  # of a number; Python takes long to read more


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
        # Merge keys (<<) repeat what they merge: a few levels of aliases would fill the memory.
        latest = {k.value if isinstance(k, yaml.ScalarNode) else id(k): (k, v) for k, v in node.value}
        node.value = list(latest.values())


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _number(text: str) -> int:
    return int(text, 16) if "x" in text else int(text.replace("o", ""), 8) if "o" in text else int(text)


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _reader(kind: str, pattern: re.Pattern[str], read: Callable[[str], Any]) -> Callable[[_Loader, yaml.Node], Any]:
    def construct(loader: _Loader, node: yaml.Node) -> Any:
        text = loader.construct_scalar(node)  # type: ignore[arg-type]
        if len(text) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(problem="a number of too many digits", problem_mark=node.start_mark)
        if not pattern.match(text):  # with a tag, such as !!int 0100
            raise yaml.MarkedYAMLError(problem=f"{text!r} is no {kind} of YAML 1.2", problem_mark=node.start_mark)
        return read(text)

    return construct


_KINDS: tuple[tuple[str, re.Pattern[str], list[str], Callable[[str], Any]], ...] = (
    ("null", _NULL, ["~", "n", "N", ""], lambda text: None),
    ("bool", _BOOL, list("tTfF"), lambda text: text.lower() == "true"),
    ("int", _INT, _DIGIT, _number),
    ("float", _FLOAT, _DIGIT, _real),
)
for _kind, _pattern, _first, _read in _KINDS:
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    _Loader.add_constructor(_TAG + _kind, _reader(_kind, _pattern, _read))
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _first)
# As a key of a mapping it merges another one into it; elsewhere it is text.
_Loader.add_implicit_resolver(_TAG + "merge", _MERGE, ["<"])
_Loader.add_constructor(_TAG + "merge", _reader("merge key", _MERGE, str))
# YAML 1.2 takes 0100 for a hundred, and some readers of YAML 1.1 take y and n for true and false.
_Dumper.add_implicit_resolver(_TAG + "int", re.compile(r"[-+]?[0-9]+\Z"), _DIGIT)
_Dumper.add_implicit_resolver(_TAG + "bool", re.compile(r"[yYnN]\Z"), list("yYnN"))


def dump(value: Any, *, default_flow_style: bool) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=default_flow_style
    )
    return text


def parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"not valid YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None


def parse_json(text: str) -> Any:
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


def nested(raw: dict[Any, Any]) -> dict[Any, Any]:
    """A configuration whose dotted keys, `crop.grid_size: 256`, are read as keys of their sections.

    They may stand at the top and in a section. The given mappings, which YAML's aliases may share, are not changed.

    Raises:
        UserError: a key is given twice, or a section has a value of its own besides.
    """
    whole: dict[Any, Any] = {}
    for key, value in raw.items():
        path = _path(key)
        if not isinstance(value, dict) or not value:
            _put(whole, path, value)
        else:
            for inner, inside in value.items():
                _put(whole, path + _path(inner), inside)
    return whole


def _path(key: Any) -> list[Any]:
    parts = key.split(".") if isinstance(key, str) else [key]
    return parts if all(parts) else [key]


def _put(whole: dict[Any, Any], path: list[Any], value: Any) -> None:
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


# -- numbers that are none by YAML 1.2 ----------------------------------------------------------------------------
_ZEROS = re.compile(r"([-+]?)0+([0-9]+)\Z")
_SIXTIES = re.compile(r"([-+]?)([0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?)\Z")
_BASES = re.compile(r"([-+]?)(0b[01]+|0x[0-9a-fA-F]+|0o[0-7]+)\Z")
_LONGEST = 40  # characters; nobody means longer ones


def meant_number(text: str) -> str | None:
    """What to write instead of text that looks like a number and is none by YAML 1.2; None: it looks like none.

    `0100` -> `100 (decimal) or 0o100 (octal: 64)`, `1:30` -> `90 (1:30 in sixties)`, `1_000` -> `1000`, `0b11` -> `3`.
    """
    plain = text.replace("_", "")
    if len(text) > _LONGEST:
        return None
    if found := _ZEROS.match(plain):
        sign, digits = found.groups()
        decimal = str(int(sign + digits))
        if sign or len(digits) < 2 or not set(digits) <= set("01234567"):
            return decimal
        return f"{decimal} (decimal) or 0o{digits} (octal: {int(digits, 8)})"
    if found := _SIXTIES.match(plain):
        value: float = 0
        for part in found[2].split(":"):
            value = 60 * value + (float(part) if "." in part else int(part))
        return f"{found[1].strip('+')}{value:.15g} ({text} in sixties)"
    if found := _BASES.match(plain):
        return str(int(found[1] + found[2], 0))
    return plain if plain != text and (_INT.match(plain) or _FLOAT.match(plain)) else None
