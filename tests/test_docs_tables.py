"""Tables of README and docs are those that their commands print from the records."""

import pytest

from models.errors import UserError
from scripts.docs_tables import documents, main, with_current_tables

COMMAND = "python scripts/benchmark.py --only-tables --table benchmarks/results/store_cpu.json"
MARKED = f"Before.\n<!-- table: {COMMAND} -->\n| by hand |\n<!-- /table -->\nAfter.\n"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_table_is_printed_from_its_record(path):
    main(["--check", str(path)])


def test_a_table_that_differs_fails_the_check_and_is_rewritten(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    with pytest.raises(UserError, match=r"page\.md: tables differ from their records; rewrite them"):
        main(["--check", str(page)])
    assert page.read_text() == MARKED
    main([str(page)])
    text = page.read_text()
    assert text.startswith("Before.\n<!-- table: ") and text.endswith(" |\n\n<!-- /table -->\nAfter.\n")
    assert "| float16, warm | " in text and "by hand" not in text
    main(["--check", str(page)])
    assert "all current" in capsys.readouterr().out


def test_globs_are_expanded_and_several_tables_of_a_page_are_kept_apart(tmp_path):
    demo = "python scripts/results_table.py --table-only benchmarks/results/demo/seed*.json"
    text = with_current_tables(MARKED + MARKED.replace(COMMAND, demo), "page.md")
    assert text.count("Before.") == 2 and text.count("After.") == 2 and "| text to image |" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: python scripts/benchmark.py --table x.json -->\n", "must come in pairs"),
        (MARKED + "<!-- /table -->\n", "must come in pairs"),
        (MARKED.replace(COMMAND, "rm -r runs"), "`rm -r runs` prints no table"),
        (MARKED.replace(COMMAND, "python train.py"), "prints no table"),
        (MARKED.replace("store_cpu", "none"), "none.json: not a benchmark record"),
    ],
)
def test_a_marker_that_prints_no_table_is_named(text, message):
    with pytest.raises(UserError, match=message):
        with_current_tables(text, "page.md")
