"""Annotation files as people have them: what a file's layout is, told by its content, and its rows.

    annotations = open_annotations(Path("captions_val2017.json"))
    for record in annotations.records():       # Record("000000391895.jpg", "A man with a red helmet ...")
        ...

Layouts beside Karpathy's JSON, which data/caption_datasets.py reads itself:
    list       [{"image": ..., "caption": one or a list}, ...], of BLIP and ALBEF
    coco       {"images": [...], "annotations": [...]}, COCO's own captions_val2017.json
    lines      an object a line: {"image": ..., "caption": ...}, or metadata.jsonl of Hugging Face's imagefolder
    table      CSV or TSV with a header, and Flickr30k's results.csv (`image_name| comment_number| comment`)
    token      Flickr30k's results.token: `1000092795.jpg#0<TAB>caption`
    parquet    a column of paths and one of captions
    dataset    a Hugging Face dataset, saved or by its name on the Hub (huggingface_datasets.py)
    folder     pictures with a .txt of the same name beside each, one caption a line; or a metadata file
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from models.errors import UserError, one_line
from models.stores.indexing import find_images

from .annotation_records import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    SPLIT_COLUMNS,
    USUAL_NAMES,
    Annotations,
    ColumnNames,
    Record,
    check_names,
    find_column,
    require_columns,
)
from .huggingface_datasets import is_dataset, open_dataset
from .json_documents import list_elements, opened, read_json

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Of a folder in imagefolder's layout."""
DELIMITERS = ",\t|;"
LONGEST_FIELD = 1 << 24
"""Characters of a table's field: where more are needed, a quote was never closed."""
_HEAD = 1 << 20
"""Characters that are looked at to tell a layout."""
_TOKEN = re.compile(r"([^\t]+)#(\d+)\t(.*)")
_NUMBER_THEN_COMMENT = re.compile(r"\s*\d+\s+(.+)")
"""results.csv has a row that lacks its second bar: `2199200615.jpg| 4   A dog runs across the grass .`"""


ANNOTATION_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".token", ".parquet")
"""Where a text file may also be a plain list of paths, one of these says that it is annotations."""


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """The command line's form of data.image_column, caption_column, split_column and val_share."""
    for name in ("image", "caption", "split"):
        parser.add_argument(
            f"--{name}-column", default="", metavar="NAME", help=f"column of {name}s in annotations, where unusual"
        )
    parser.add_argument(
        "--val-share", type=float, default=0.0, help="share of annotations without splits that is their split val"
    )


def column_names(arguments: argparse.Namespace) -> ColumnNames:
    """What these options named."""
    return ColumnNames(arguments.image_column, arguments.caption_column, arguments.split_column)


def open_annotations(
    file: Path,
    columns: ColumnNames = USUAL_NAMES,
    root: Path | None = None,
    wanted_splits: Collection[str | None] | None = None,
) -> Annotations:
    """The layout of a file or folder, and its rows.

    root: the folder that a folder's image paths are to be relative to, by default itself. wanted_splits: those that the
    caller will keep (None: all); records of others may then name images less carefully. Raises UserError naming the
    file where it is missing, cannot be read, is of no known layout or lacks a column."""
    if is_dataset(file):
        return open_dataset(file, columns, wanted_splits)
    if file.is_dir():
        return _open_folder(file, columns, root or file)
    head = _head(file)
    if head.startswith(b"PAR1"):
        return _open_parquet(file, columns)
    if b"\0" in head:
        raise UserError(f"{file}: no UTF-8 text: packed, in another encoding, or no annotations; unpack or convert it")
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if not text:
        raise UserError(f"{file}: empty, as a truncated download is; pass an annotation file")
    if text.startswith("["):
        first = next(list_elements(file), None)
        has_splits = isinstance(first, dict) and find_column(first, columns.split, SPLIT_COLUMNS) is not None
        return Annotations(file, "list", has_splits, lambda: _mapped(list_elements(file), file, columns, _LIST_LAYOUT))
    if text.startswith("{"):
        return _open_objects(file, text, columns)
    if _TOKEN.match(text.split("\n", 1)[0]):
        return Annotations(file, "token", False, lambda: _token_records(file))
    return _open_table(file, text, columns)


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_HEAD)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; pass the annotation file of the data set") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); pass an annotation file") from error


_LIST_LAYOUT = 'row {} lacks "image" or "caption"; expected the layout of BLIP or ALBEF'
_LINE_LAYOUT = 'line {} has no image or no caption; expected "image" or "file_name", and "caption" or "text"'


def _open_objects(file: Path, text: str, columns: ColumnNames) -> Annotations:
    first = text.split("\n", 1)[0]
    try:
        row = json.loads(first)
    except ValueError:
        row = None
    if isinstance(row, dict) and not row.keys() & {"images", "annotations"}:
        has_splits = find_column(row, columns.split, SPLIT_COLUMNS) is not None
        require_columns(row, columns, file, str(first)[:80])
        return Annotations(file, "lines", has_splits, lambda: _mapped(_lines(file), file, columns, _LINE_LAYOUT, 1))
    if '"sentences"' in text:  # without reading all of what may be a hundred megabytes
        return Annotations(file, "karpathy", True, lambda: iter(()))
    document = read_json(file)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UserError(
            f'{file}: expected {{"images": [...]}} (Karpathy, COCO), a list of images with captions, JSON lines, CSV, '
            "TSV or parquet; docs/data.md shows each"
        )
    if isinstance(document.get("annotations"), list):
        return Annotations(file, "coco", False, lambda: _coco_records(document, file))
    return Annotations(file, "karpathy", True, lambda: iter(()))


def _mapped(rows: Iterable[Any], file: Path, columns: ColumnNames, layout: str, first: int = 0) -> Iterator[Record]:
    """Records of objects. The columns are looked up once for all rows of the same keys."""
    keys: Any = None
    for number, row in enumerate(rows, first):
        if not isinstance(row, dict):
            raise UserError(f"{file}: {layout.format(number)}")
        if row.keys() != keys:
            keys = row.keys()
            image, caption = (
                find_column(keys, columns.image, IMAGE_COLUMNS),
                find_column(keys, columns.caption, CAPTION_COLUMNS),
            )
            split = find_column(keys, columns.split, SPLIT_COLUMNS)
        if image is None or caption is None or not isinstance(row[image], str):
            raise UserError(f"{file}: {layout.format(number)}")
        if not row[image].isprintable() or "subset" in row:
            check_names(row, (image, "subset"), f"{file}: row {number}")
        yield Record(row[image], row[caption], row.get("subset"), row[split] if split else None)


def _lines(file: Path) -> Iterator[Any]:
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}: line {number} is not valid JSON ({error}); repair or remove it") from None


def _coco_records(document: dict[str, Any], file: Path) -> Iterator[Record]:
    names: dict[Any, str] = {}
    for number, image in enumerate(document["images"]):
        if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
            raise UserError(f'{file}: images[{number}] has no "id" or no "file_name"; expected COCO\'s layout')
        check_names(image, ("file_name",), f"{file}: images[{number}]")
        if image["id"] in names:
            raise UserError(f"{file}: images[{number}] has the id {image['id']!r} of an image before; give it its own")
        names[image["id"]] = image["file_name"]
    captions: dict[Any, list[object]] = {number: [] for number in names}
    for number, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise UserError(f'{file}: annotations[{number}] has no "caption"; pass captions_*.json, not instances')
        if annotation.get("image_id") not in names:
            raise UserError(
                f"{file}: annotations[{number}] is of image_id {annotation.get('image_id')!r}, which is not among the "
                "images; fetch the file again"
            )
        captions[annotation["image_id"]].append(annotation["caption"])
    return (Record(name, captions[number]) for number, name in names.items())


def _token_records(file: Path) -> Iterator[Record]:
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            match = _TOKEN.match(line.rstrip("\r\n"))
            if match is None:
                raise UserError(f"{file}: line {number} is no IMAGE#NUMBER<TAB>caption; repair or remove it")
            yield Record(match[1], match[3])


def _open_table(file: Path, text: str, columns: ColumnNames) -> Annotations:
    header = text.split("\n", 1)[0].rstrip("\r")
    delimiter = max(DELIMITERS, key=header.count)
    names = _fields(header, delimiter)
    if header.count(delimiter) == 0:
        raise UserError(
            f"{file}: {header[:60]!r} is no header with several columns, and the file is no JSON or parquet; "
            "pass annotations, docs/data.md shows each layout"
        )
    image, caption = require_columns(names, columns, file, header[:80])
    split = find_column(names, columns.split, SPLIT_COLUMNS)
    if columns.split and split is None:
        raise UserError(f"{file}: no column {columns.split!r} among {', '.join(map(repr, names))}")
    positions = names.index(image), names.index(caption), names.index(split) if split else None
    return Annotations(file, "table", split is not None, lambda: _table_records(file, delimiter, len(names), positions))


def _fields(line: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def _table_records(file: Path, delimiter: str, width: int, positions: tuple[int, int, int | None]) -> Iterator[Record]:
    image, caption, split = positions
    with opened(file, newline="") as stream:
        for number, row in _table_rows(stream, file, delimiter):
            if len(row) == width - 1 and delimiter == "|" and (match := _NUMBER_THEN_COMMENT.fullmatch(row[-1])):
                row = [*row[:-1], "", match[1]]
            if len(row) != width:
                raise UserError(f"{file}: line {number} has {len(row)} fields, the header {width}; quote or repair it")
            name = row[image].strip()
            if not name or not name.isprintable():
                check_names({"image": name}, ("image",), f"{file}: line {number}")
                if not name:
                    raise UserError(f"{file}: line {number} names no image; repair or remove it")
            yield Record(name, row[caption].strip(), None, row[split].strip() if split is not None else None)


def _table_rows(stream: TextIO, file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row behind the header; empty lines are none."""
    rows = _lines_of_fields(stream, delimiter) if delimiter in "\t|" else _quoted_rows(stream, file, delimiter)
    for number, row in itertools.islice(rows, 1, None):
        if len(row) > 1 or row[0].strip():
            yield number, row


def _lines_of_fields(stream: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """A row a line, where most captions come without quotes: one that only begins with a quote must not swallow the
    lines behind it. With tabs, a field that is quoted from end to end is as pandas writes it."""
    for number, line in enumerate(stream, 1):
        fields = line.rstrip("\r\n").split(delimiter)
        yield number, [_unquoted(field) for field in fields] if delimiter == "\t" else fields


def _unquoted(field: str) -> str:
    if len(field) < 2 or field[0] != '"' or field[-1] != '"':
        return field
    return field[1:-1].replace('""', '"')


def _quoted_rows(stream: TextIO, file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)  # a quote that is never closed is an error
    try:
        for row in reader:
            yield reader.line_num, row or [""]
    except csv.Error as error:
        raise UserError(
            f"{file}: line {reader.line_num} cannot be read ({error}); close or double its quotes"
        ) from None


def _open_parquet(file: Path, columns: ColumnNames) -> Annotations:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: not readable as parquet ({one_line(error)}); fetch it again") from error
    image, caption = require_columns(schema.names, columns, file, "its columns")
    split = find_column(schema.names, columns.split, SPLIT_COLUMNS)
    kind = schema.field(image).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{file}: column {image!r} holds {kind}, not paths; name another with data.image_column")

    def records() -> Iterator[Record]:
        wanted = list(filter(None, (image, caption, split)))
        try:
            for batch in pq.ParquetFile(file).iter_batches(columns=wanted):
                yield from _mapped(
                    batch.to_pylist(), file, ColumnNames(image, caption, split or ""), "row {} has no image"
                )
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: damaged ({one_line(error)}); fetch it again") from error

    return Annotations(file, "parquet", split is not None, records)


def _open_folder(folder: Path, columns: ColumnNames, root: Path) -> Annotations:
    try:
        prefix = folder.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise UserError(f"{folder}: lies outside of the data root {root}; pass a root above it") from None
    prefix = "" if prefix == "." else f"{prefix}/"
    metadata = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if metadata is not None:
        inner = open_annotations(metadata, columns)
        return Annotations(
            folder,
            "folder",
            inner.has_splits,
            lambda: (record._replace(image=prefix + record.image) for record in inner.records()),
        )
    return Annotations(folder, "folder", False, lambda: _folder_records(folder, prefix))


def _folder_records(folder: Path, prefix: str) -> Iterator[Record]:
    captioned = False
    for name in find_images(folder):
        captions = _captions_beside((folder / name).with_suffix(""))
        captioned = captioned or bool(captions)
        yield Record(prefix + name, captions)
    if not captioned:
        raise UserError(
            f"{folder}: no image in it has a .txt of the same name beside it, and there is none of "
            f"{', '.join(METADATA_FILES)}; write captions there, or pass an annotation file"
        )


def _captions_beside(stem: Path) -> list[str]:
    """The lines of STEM.txt, else the "caption" of STEM.json, as img2dataset writes both."""
    text, data = stem.with_name(f"{stem.name}.txt"), stem.with_name(f"{stem.name}.json")
    try:
        if text.is_file():
            lines = [line.strip() for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if lines:
                return lines
        if data.is_file():
            caption = json.loads(data.read_text(encoding="utf-8-sig")).get("caption")
            return [caption] if isinstance(caption, str) and caption.strip() else []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{stem.name}: its caption cannot be read ({one_line(error)}); repair {text} or {data}"
        ) from None
    return []
