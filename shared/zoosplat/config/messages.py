"""The errors that pydantic finds, a line each: the key, the value, what is valid and the nearest valid value."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from zoosplat.config.serialization import suggest_number

MAX_LINES = 30  # A screenful; a file of another kind would give a line for every key.
# What people write for true and false, in lower case.
BOOLEAN_WORDS = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _field(model: type[BaseModel], loc: Sequence[Any]) -> tuple[Any, str]:
    """Default value (None where there is none) and description of the key at `loc`, or of the list that it is in."""
    default, text = None, ""
    for part in loc:
        if part not in model.model_fields:
            break
        field = model.model_fields[part]
        default, text = field.get_default() if not field.is_required() else None, field.description or ""
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return default, text


def _without_tags(loc: Sequence[Any], model: type[BaseModel]) -> tuple[Any, ...]:
    """The place of a value, without the names that pydantic gives to the alternatives of a union."""
    found: list[Any] = []
    fields: dict[str, Any] = dict(model.model_fields)
    for part in loc:
        if isinstance(part, int):
            found.append(part)
        elif part in fields:
            found.append(part)
            inner = fields[part].annotation
            fields = dict(inner.model_fields) if isinstance(inner, type) and issubclass(inner, BaseModel) else {}
    return tuple(found)


def _unknown(key: str, model: type[BaseModel]) -> str:
    section, _, leaf = key.rpartition(".")
    known = list(_keys(model))
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = difflib.get_close_matches(key, siblings, 1, 0.75)
    close = close or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.7)]
    if close:
        return f"unknown key {key} (did you mean {close[0]}?)"
    return f"unknown key {key}; valid: {', '.join(siblings)}"


def describe_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each error of a validation: the key, the value, what is valid, the nearest valid value."""
    lines: list[str] = []
    more = 0
    for detail in error.errors(include_url=False):
        if len(lines) >= MAX_LINES:  # The search for close keys would take long.
            more += 1
            continue
        kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
        loc = detail["loc"] if kind in ("extra_forbidden", "missing") else _without_tags(detail["loc"], model)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
        if kind == "extra_forbidden":
            lines.append(_unknown(key, model))
        elif kind == "missing":
            _, meaning = _field(model, loc)
            lines.append(f"{key} is missing" + (f": {meaning}" if meaning else ""))
        elif kind == "value_error" and not loc:
            lines += str(context["error"]).splitlines()
        elif kind == "value_error":
            near = _suggestion(value)
            lines.append(f"{key} = {_short(value)}: {context['error']}" + (f"; nearest: {near}" if near else ""))
        else:
            rule = _rule(kind, value, context, detail["msg"])
            default = _field(model, loc)[0] if kind == "greater_than" else None
            lines.append(f"{key} = {_short(value)}: {rule}" + (f"; default: {default}" if default else ""))
    lines = list(dict.fromkeys(lines))
    more += len(lines[MAX_LINES:])
    return lines[:MAX_LINES] + ([f"and {more} more problems"] if more else [])


def _suggestion(value: Any) -> str | None:
    """What to write instead of text that looks like a number: a value, or the first such of a list."""
    if isinstance(value, str):
        return suggest_number(value)
    texts = [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []
    return next((f"{near} for {text}" for text in texts if (near := suggest_number(text))), None)


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return "a huge number"


def _rule(kind: str, value: Any, context: dict[str, Any], message: str) -> str:
    near: Any = None
    if kind in ("int_type", "float_type", "int_from_float", "int_parsing_size"):
        text = "must be a whole number" if kind.startswith("int") else "must be a number"
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, str) and (meant := suggest_number(value)):
            near = meant
        elif math.isfinite(number):
            near = round(number) if kind.startswith("int") else number
    elif kind == "finite_number":
        text = "must be finite"
    elif kind == "greater_than":
        text = f"must be greater than {context['gt']:g}"
    elif kind == "greater_than_equal":
        text, near = f"must be at least {context['ge']}", context["ge"]
    elif kind == "less_than_equal":
        text, near = f"must be at most {context['le']}", context["le"]
    elif kind == "literal_error":
        text = f"must be {context['expected']}"
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = next(iter(difflib.get_close_matches(_short(value).strip("'").lower(), choices, 1)), None)
    elif kind == "bool_type":
        text, near = "must be true or false", BOOLEAN_WORDS.get(value.lower()) if isinstance(value, str) else None
    else:
        text = {
            "string_type": "must be text (in quotes, if it looks like a number, true, false or null)",
            "string_too_short": "must not be empty",
            "string_too_long": f"must have at most {context.get('max_length')} characters",
            "too_short": f"must have at least {context.get('min_length')} entries",
            "too_long": f"must have at most {context.get('max_length')} entries",
            "tuple_type": "must be a list",
            "list_type": "must be a list",
            "model_type": "must be a section, with keys of its own",
            "model_attributes_type": "must be a section, with keys of its own",
        }.get(kind, message[0].lower() + message[1:])
    return text if near is None else f"{text}; nearest: {near}"
