"""Dataclasses from and to plain dictionaries (YAML), with errors that name the key, its file and the nearest valid key.

config = from_dict(EDJEConfig, yaml.safe_load(text), where="runs/demo/config.yaml")
yaml.safe_dump(to_dict(config))
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Protocol, TypeVar, runtime_checkable

from .errors import UserError

T = TypeVar("T")


@runtime_checkable
class HasVariants(Protocol):
    """A dataclass whose section of a file may mean one of several: it says which, and how that reads the section."""

    @classmethod
    def class_for(cls, data: dict[str, Any]) -> tuple[type, dict[str, Any]]: ...


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of YAML's own types (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if is_saved(f)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build `cls` (a dataclass, nested ones included) from dictionaries. `where` is the file, for messages.

    Raises UserError with every problem at once: unknown keys (and the nearest valid one), missing keys, wrong types."""
    problems: list[str] = []
    config = _build(cls, data, "", problems)
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))
    return config


def _build(cls: type, data: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        problems.append(f"'{prefix.rstrip('.') or 'the file'}' is {data!r}; expected a mapping of keys to values")
        return None
    if issubclass(cls, HasVariants):
        try:
            cls, data = cls.class_for(data)
        except UserError as error:
            problems.append(str(error))
            return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if is_saved(f)}
    problems += [
        unknown_key(prefix + str(key), [prefix + name for name in fields]) for key in data if key not in fields
    ]
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], prefix + name, problems)
        elif _is_required(field):
            problems.append(f"key '{prefix}{name}' is missing")
    if problems:
        return None
    try:
        return cls(**values)
    except UserError as error:
        problems.append(str(error))
        return None


def is_saved(field: dataclasses.Field) -> bool:
    """Whether files hold the field; a record of how the configuration was made is not saved."""
    return bool(field.metadata.get("saved", True))


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key '{key}'; {hint}"


def _convert(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value` as the type of the field, or a problem noted. 1 passes for 1.0, and '3e-4' (a YAML string) for 0.0003."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, key + ".", problems)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        choices = [a for a in arguments if a is not type(None)]
        # One value, or a list of them, as in `str | tuple[str, ...]`.
        wants_list = isinstance(value, (list, tuple))
        hint = next((a for a in choices if (typing.get_origin(a) is tuple) == wants_list), choices[0])
        return _convert(hint, value, key, problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(arguments[0], v, key, problems) for v in value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is hint:
        return value
    problems.append(f"'{key}' is {value!r}; expected {type_name(hint)}")
    return None


_TYPE_NAMES = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
}


def type_name(hint: Any, plural: bool = False) -> str:
    """A field's type in words: `float | None` is "a number or null", `tuple[str, ...]` "a list of strings"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"{'lists' if plural else 'a list'} of {type_name(arguments[0], plural=True)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument, plural) for argument in arguments)
    if hint is dict or origin is dict or dataclasses.is_dataclass(hint):
        return "mappings" if plural else "a mapping"
    return _TYPE_NAMES[hint][plural]
