"""Reading a record of ours from JSON, field by field, with errors that name file and path.

fields = read_json_object(Path("runs/demo/results.json"), "results.json of evaluation/evaluate_retrieval.py")
fields.text("split"), fields.inside("t2i").number("pool_ceiling")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

from models.errors import UserError, one_line


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are read with their kinds checked; UserError where one is missing or of another."""

    content: dict[str, object]
    where: str
    """`FILE: not a WHAT: `, the start of every message."""
    path: str = ""
    """Names on the way to this object, with a dot behind each."""

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def inside(self, name: str) -> Fields:
        """The object under a name."""
        value = self.content.get(name)
        if isinstance(value, dict):
            return Fields(value, self.where, f"{self.path}{name}.")
        self._refuse(name, "an object")

    def text(self, name: str) -> str:
        value = self.content.get(name)
        return value if isinstance(value, str) else self._refuse(name, "text")

    def whole(self, name: str) -> int:
        value = self.content.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else self._refuse(name, "a whole number")

    def number(self, name: str) -> float:
        value = self.content.get(name)
        return value if _is_number(value) else self._refuse(name, "a number")

    def two_numbers(self, name: str) -> tuple[float, float]:
        value = self.content.get(name)
        if isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and _is_number(value[1]):
            return value[0], value[1]
        self._refuse(name, "two numbers")

    def texts(self, name: str) -> list[str]:
        value = self.content.get(name)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
        self._refuse(name, "a list of texts")

    def list_of_numbers(self, name: str) -> list[float]:
        value = self.content.get(name)
        if isinstance(value, list) and all(_is_number(part) for part in value):
            return value
        self._refuse(name, "a list of numbers")

    def numbers(self, name: str) -> dict[str, float]:
        """An object of numbers."""
        inside = self.inside(name)
        return {key: inside.number(key) for key in inside}

    def named_texts(self, name: str) -> dict[str, str]:
        """An object of texts."""
        inside = self.inside(name)
        return {key: inside.text(key) for key in inside}

    def optional_whole(self, name: str) -> int | None:
        """A whole number or null."""
        return None if self.is_null(name) else self.whole(name)

    def optional_number(self, name: str) -> float | None:
        """A number or null."""
        return None if self.is_null(name) else self.number(name)

    def optional_truth(self, name: str) -> bool | None:
        """true, false or null."""
        value = self.content.get(name)
        if isinstance(value, bool) or (value is None and name in self.content):
            return value
        self._refuse(name, "true, false or null")

    def is_null(self, name: str) -> bool:
        return name in self.content and self.content[name] is None

    def _refuse(self, name: str, expected: str) -> NoReturn:
        found = f"is {self.content[name]!r:.60}" if name in self.content else "is missing"
        raise UserError(f"{self.where}{self.path}{name} {found}; expected {expected}; write it again")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json_object(path: Path, what: str) -> Fields:
    """The object that a file holds. what: whose file it should be, for messages. Raises UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a {what} ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a {what}: the document is {content!r:.60}; expected an object")
    return Fields(content, f"{path}: not a {what}: ")
