"""Print every table of README.md and docs/ from its record, so that no figure is typed by hand.

python scripts/docs_tables.py             rewrite the tables
python scripts/docs_tables.py --check     change nothing; exit code 2 where a table differs from its record

A table lies between two comments, the first of which holds the command that prints it:
    <!-- table: python scripts/results_table.py --table-only benchmarks/results/demo/seed*.json -->
    <!-- /table -->
Commands run in the checkout's root, in this process; globs are expanded as a shell would. A script takes part by a
main(argv) that prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError, run_entry_point
from models.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(?P<open><!-- table: (?P<command>.+?) -->)\n(?P<body>.*?)(?P<close><!-- /table -->)", re.DOTALL)
SCRIPTS = ("ablate", "benchmark", "results_table", "scene_errors")
"""Those that print tables from records."""


def documents() -> list[Path]:
    """The files whose tables are kept current."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_current_tables(text: str, where: str) -> str:
    """A document with every marked table printed again. where: the document, for messages.

    Raises UserError for a marker without its partner or a command that is not one of SCRIPTS."""
    pairs = len(TABLE.findall(text))
    if text.count("<!-- table:") != pairs or text.count("<!-- /table -->") != pairs:
        raise UserError(f"{where}: `<!-- table: COMMAND -->` and `<!-- /table -->` must come in pairs")
    return TABLE.sub(lambda match: f"{match['open']}\n\n{printed(match['command'], where)}\n\n{match['close']}", text)


def printed(command: str, where: str) -> str:
    """What a command prints, run in this process: `python`, one of our scripts, its arguments."""
    words = shlex.split(command)
    name = Path(words[1]).stem if len(words) > 1 else ""
    if words[:1] != ["python"] or name not in SCRIPTS or words[1] != f"scripts/{name}.py":
        expected = ", ".join(f"python scripts/{script}.py" for script in SCRIPTS)
        raise UserError(f"{where}: `{command}` prints no table; expected one of {expected}, with its arguments")
    script = importlib.import_module(f"scripts.{name}")
    output = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(output):
        script.main([part for word in words[2:] for part in expanded(word)])
    return output.getvalue().strip()


def expanded(word: str) -> list[str]:
    """A word of a command as the shell would hand it over: a glob becomes the files that it names, sorted."""
    found = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(word)) if "*" in word else []
    return found or [word]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="documents (default: README.md and docs/**/*.md)")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is not current")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    stale = []
    for path in arguments.files or documents():
        if not path.is_file():
            raise UserError(f"{path}: no such document")
        text = path.read_text(encoding="utf-8")
        current = with_current_tables(text, str(path))
        if current != text:
            stale.append(str(path))
            if not arguments.check:
                write_atomically(path, current)
    if stale and arguments.check:
        raise UserError(
            f"{', '.join(stale)}: tables differ from their records; rewrite them with scripts/docs_tables.py"
        )
    print(f"{'rewritten' if stale else 'all current'}{': ' + ', '.join(stale) if stale else ''}")


if __name__ == "__main__":
    run_entry_point(main)
