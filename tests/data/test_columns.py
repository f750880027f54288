"""Columns are the lists that they were made of, in memory, mapped from a cache, and in any order."""

import pickle

import numpy as np
import pytest

from data.columns import TextColumn, cached_columns
from models.errors import UserError

TEXTS = ["", "a red ball", "Überraschung", "日本語", "🎈", "", "half a pair \ud83d", "two\nlines\x00"]


def test_a_column_is_the_list_of_its_strings():
    column = TextColumn.of(TEXTS)
    assert len(column) == len(TEXTS) and list(column) == TEXTS and column == TEXTS
    assert [column[i] for i in range(-8, 8)] == TEXTS + TEXTS
    assert column[1:7:2] == TEXTS[1:7:2] and column[-2:] == TEXTS[-2:]
    assert "日本語" in column and "absent" not in column and column.index("🎈") == 4
    assert column != TEXTS[:-1] and column != TEXTS[::-1]
    with pytest.raises(IndexError):
        column[len(TEXTS)]


@pytest.mark.parametrize("seed", range(5))
def test_take_gives_the_strings_of_the_numbers(seed, monkeypatch):
    monkeypatch.setattr("data.columns._CHUNK", 3)
    rng = np.random.default_rng(seed)
    index = rng.integers(len(TEXTS), size=rng.integers(1, 20))
    taken = TextColumn.of(TEXTS).take(index)
    assert taken == [TEXTS[i] for i in index] and taken.take(np.arange(1)) == [TEXTS[index[0]]]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "list.json"
    file.write_text("content")
    return file


def cached(tmp_path, source, texts=TEXTS):
    build = lambda: {"texts": TextColumn.of(texts), "numbers": np.arange(3)}  # noqa: E731
    return cached_columns(tmp_path / "cache", "name", [source], build)


def test_the_cache_is_built_once_and_again_when_its_file_changes(tmp_path, source):
    first, columns = cached(tmp_path, source)
    assert columns["texts"] == TEXTS and columns["numbers"].tolist() == [0, 1, 2]
    second, columns = cached(tmp_path, source, ["never built"])
    assert second == first and columns["texts"] == TEXTS
    source.write_text("other content")
    third, columns = cached(tmp_path, source, ["new"])
    assert third != first and columns["texts"] == ["new"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # nothing temporary is left


def test_a_cache_of_another_layout_is_built_again(tmp_path, source, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr("data.columns._VERSION", 2)
        first, _ = cached(tmp_path, source)
    second, columns = cached(tmp_path, source, ["built again"])
    assert second != first and columns["texts"] == ["built again"]


def test_of_two_builders_one_result_stays(tmp_path, source):
    def build():
        cached(tmp_path, source, ["first"])
        return {"texts": TextColumn.of(["second"])}

    folder, columns = cached_columns(tmp_path / "cache", "name", [source], build)
    assert columns["texts"] == ["first"] and list((tmp_path / "cache").iterdir()) == [folder]


def test_a_build_that_fails_leaves_nothing(tmp_path, source):
    def build():
        raise UserError("wrong row")

    with pytest.raises(UserError, match="wrong row"):
        cached_columns(tmp_path / "cache", "name", [source], build)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_names_its_folder(tmp_path, source):
    folder, _ = cached(tmp_path, source)
    file = folder / "texts.arrow"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{folder.name}: damaged .*remove this folder"):
        cached(tmp_path, source)


def test_a_missing_source_and_an_unwritable_cache_are_errors(tmp_path, source):
    with pytest.raises(UserError, match="absent.json: cannot be read"):
        cached(tmp_path, tmp_path / "absent.json")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        cached(tmp_path, source)


def test_a_column_survives_pickling():
    assert pickle.loads(pickle.dumps(TextColumn.of(TEXTS))) == TEXTS
