"""JSON files of any size: a list is read element by element, in the memory of one element.

for row in list_elements("cc12m.json"):     # 1 GB of JSON, 1 MB of it in memory
    ...

Why no library: ijson reads a million pairs in 0.8 to 1.2 s, this module in 2.2 to 2.8 s, both in 4 MB and once per
data set. But ijson replaces half a surrogate pair by "?" in silence, and its memory grows with the square of how deep
brackets are nested: 1 GB at 20,000. orjson holds the whole document, 0.7 GB for a million pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from models.errors import UserError

_CHUNK = 1 << 20
"""Characters read at once."""
_LONGEST = 1 << 24
"""Characters of an element: where more are needed the file is damaged, a bracket or quote never closed."""
_SPACE = re.compile(r"[ \t\n\r]*")


def read_json(file: Path) -> Any:
    """A whole document. Raises UserError naming the file: missing, not readable, no JSON."""
    with opened(file) as stream:
        return json.load(stream)


def is_list(file: Path) -> bool:
    """Whether a document is a list, by its first character. Raises UserError if the file cannot be read."""
    with opened(file) as stream:
        return _Text(stream).peek() == "["


def list_elements(file: Path) -> Iterator[Any]:
    """The elements of a document that is a list. Raises UserError naming the file where it is no JSON."""
    with opened(file) as stream:
        text, number = _Text(stream), 0
        text.expect("[")
        while text.peek() != "]" or number:
            yield text.value()
            number += 1
            if text.peek() == "]":
                break
            text.expect(",")
        text.expect("]")
        text.expect("")


@contextmanager
def opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file as UTF-8. Raises UserError naming it: missing, not readable, or JSON in it that is none."""
    try:
        # Editors of Windows write a byte order mark, also into UTF-8.
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; pass the annotation file of the data set") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); pass an annotation file") from error
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); truncated or not an annotation file") from error
    except RecursionError:
        raise UserError(f"{file}: brackets are nested too deeply to be read; not an annotation file") from None


class _Text:
    """The characters of a stream, and a place in them."""

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.at, self.before = stream, "", 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it matches nothing, too
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def expect(self, character: str) -> None:
        """Step over `character`; "" is the end. Raises ValueError if another one comes."""
        found = self.peek()
        if found != character:
            wanted = repr(character) if character else "the end"
            raise ValueError(
                f"{repr(found) if found else 'the end'} at character {self.before + self.at}, not {wanted}"
            )
        self.at += len(character)

    def value(self) -> Any:
        """The JSON value that comes next. Raises ValueError where there is none."""
        self.peek()
        while True:
            try:
                value, self.at = self.decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:  # wrong, or not read to its end yet
                if len(self.text) - self.at > _LONGEST or not self._read_on():
                    raise ValueError(f"{error.msg} at character {self.before + error.pos}") from None

    def _read_on(self) -> bool:
        """Twice as much as is left each time: a long value is tried a few times only."""
        left = self.text[self.at :]
        piece = self.stream.read(max(_CHUNK, len(left)))
        self.before, self.text, self.at = self.before + self.at, left + piece, 0
        return bool(piece)
