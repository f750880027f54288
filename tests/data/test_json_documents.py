"""A list read element by element is what json.load reads, wherever a chunk ends; what that refuses, this refuses."""

import io
import json
import random

import pytest

from data import json_documents
from data.json_documents import is_list, list_elements, read_json
from models.errors import UserError


@pytest.fixture(params=[1, 2, 7, 1 << 20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(json_documents, "_CHUNK", request.param)


def write(tmp_path, text):
    file = tmp_path / "rows.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("seed", range(4))
def test_elements_are_those_of_json_load(tmp_path, chunk, seed):
    rng = random.Random(seed)
    alphabet = 'ab,]}["{\\ \n:é日🎈'
    rows = [
        {
            "image": "".join(rng.choices(alphabet, k=rng.randrange(9))),
            "caption": [rng.choice(alphabet)] * rng.randrange(3),
        }
        for _ in range(rng.randrange(6))
    ]
    for layout in ({}, {"indent": 1}, {"separators": (" , ", " : ")}, {"ensure_ascii": False}):
        file = write(tmp_path, " \n" + json.dumps(rows, **layout) + "\n")
        assert is_list(file) and list(list_elements(file)) == rows


@pytest.mark.parametrize(
    "text",
    ["[", '[{"a": 1}', '[{"a": 1},', '[{"a": 1},]', "[,]", '[{"a": 1} {"a": 2}]', '[{"a": "x', '[{"a": 1}] x', "[{]",
     '[{"a": tru}]', b'[{"a": "\xff"}]', "[]]"],
)  # fmt: skip
def test_what_json_refuses_is_refused_with_the_files_name(tmp_path, chunk, text):
    with pytest.raises((json.JSONDecodeError, UnicodeDecodeError)):
        json.load(io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "utf-8"))
    with pytest.raises(UserError, match="rows.json: not (valid JSON|UTF-8 text)"):
        list(list_elements(write(tmp_path, text)))


def test_a_byte_order_mark_is_not_part_of_the_document(tmp_path, chunk):
    file = write(tmp_path, b"\xef\xbb\xbf" + b'[{"a": 1}]')
    assert is_list(file) and list(list_elements(file)) == read_json(file) == [{"a": 1}]


@pytest.mark.parametrize("read", [read_json, lambda file: list(list_elements(file))])
def test_brackets_nested_without_end_are_refused_with_the_files_name(tmp_path, read):
    with pytest.raises(UserError, match="rows.json: brackets are nested too deeply"):
        read(write(tmp_path, "[" * 100_000 + "]" * 100_000))


def test_a_string_that_never_ends_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_documents, "_CHUNK", 16)
    monkeypatch.setattr(json_documents, "_LONGEST", 100)
    file = write(tmp_path, '[{"a": "' + "x" * 100_000)
    with file.open() as stream:
        text = json_documents._Text(stream)
        text.expect("[")
        with pytest.raises(ValueError, match="Unterminated string"):
            text.value()
        assert stream.read()
