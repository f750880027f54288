"""The meaning, type and default of every configuration key, read from the dataclasses and their fields' docstrings.

`train.py --help` prints them; docs/config.md is made of them: python -m training.config_reference > docs/config.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.config_io import is_saved, type_name

from .config import RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HEADER = """# Configuration keys

Every key of a run's YAML file (`train.py --config FILE`). On the command line a key is written with dots, as
`training.lr=1e-4`. A key that is left out has the default. `base: FILE` in a file, relative to it, names
another file whose keys it inherits. `train.py --help` prints the same list.

<!-- Made from the dataclasses by `python -m training.config_reference > docs/config.md`: edit their docstrings. -->
"""


@dataclass(frozen=True)
class Key:
    """One key that holds a value."""

    name: str
    """With its sections, e.g. `training.lr`."""
    kind: str
    """Its type in words, e.g. `a number or null`."""
    default: str
    """As YAML writes it."""
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass, without those of the dataclasses in it."""

    name: str
    """E.g. `model.adapter`; empty for the keys outside all sections."""
    meaning: str
    keys: tuple[Key, ...]


def sections(config: DataclassInstance, name: str = "", meaning: str = "") -> Iterator[Section]:
    """The sections of a configuration that has all defaults, outermost first."""
    hints, meanings = typing.get_type_hints(type(config)), field_docstrings(type(config))
    keys: list[Key] = []
    inner: list[tuple[DataclassInstance, str, str]] = []
    for field in dataclasses.fields(config):
        if not is_saved(field):
            continue
        value, full_name = getattr(config, field.name), f"{name}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner.append((value, full_name, meanings.get(field.name, "")))
        else:
            default = json.dumps(value, ensure_ascii=False)
            keys.append(Key(full_name, type_name(hints[field.name]), default, meanings.get(field.name, "")))
    yield Section(name, meaning or _one_paragraph(type(config).__doc__ or ""), tuple(keys))
    for value, full_name, text in inner:
        yield from sections(value, full_name, text)


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, as one paragraph; none: left out."""
    found: dict[str, str] = {}
    for base in cls.__mro__[-2:0:-1]:
        found |= field_docstrings(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
            continue
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = _one_paragraph(str(following.value.value))
    return found


def help_text(width: int = 100) -> str:
    """Every key for a terminal: `key: type (default)`, the meaning below."""
    lines = ["configuration keys, as they are written in YAML files and overrides:"]
    for section in sections(RunConfig()):
        title = f"{section.name}: {section.meaning}" if section.name else section.meaning
        lines += ["", *textwrap.wrap(title, width)]
        for key in section.keys:
            lines.append(f"  {key.name}: {key.kind} (default {key.default})")
            lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def markdown() -> str:
    """docs/config.md: a table for each section."""
    parts = [HEADER]
    for section in sections(RunConfig()):
        title = f"## `{section.name}`\n\n" if section.name else "## The run\n\n"
        rows = [f"| `{key.name}` | {key.kind} | `{key.default}` | {key.meaning} |" for key in section.keys]
        parts.append(f"{title}{section.meaning}\n\n| key | type | default | meaning |\n|---|---|---|---|")
        parts[-1] += "".join(f"\n{row}" for row in rows) + "\n"
    return "\n".join(parts)


def _one_paragraph(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(markdown(), end="")
