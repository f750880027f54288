"""README and docs cannot rot: settings are taken, files and names exist, every page is on the site.

Blocks and commands are run by tests/test_docs_snippets.py."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

from tests.documentation import PAGES, ROOT, name_of
from training.config import RunConfig, load_config
from training.config_reference import sections

KEYS = {name for section in sections(RunConfig()) for name in (section.name, *(key.name for key in section.keys))}
KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
SETTING = re.compile(rf"{KEY.pattern}=\S*")


def settings() -> list:
    """`key=value key=value` in the pages' prose."""
    found = {}
    for page in PAGES:
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text()):
            if all(SETTING.fullmatch(word) for word in code.split()):
                found[code] = name_of(page)
    return [pytest.param(code, id=f"{page}: {code}") for code, page in found.items()]


@pytest.mark.parametrize("code", settings())
def test_settings_in_the_documentation_are_taken(code, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data: {val_split: ''}\nnegatives: {mode: groups, store: IMAGES, caption_store: CAPTIONS}")
    load_config(file, code.split())


def test_keys_in_the_documentation_are_keys_of_the_configuration():
    keys = {key for page in PAGES for key in re.findall(rf"`({KEY.pattern})`", page.read_text())}
    keys = {key for key in keys if key.partition(".")[0] in KEYS and not key.endswith(".py")}
    assert len(keys) > 8
    assert keys <= KEYS


def options_of(script: Path, *subcommand: str) -> set[str]:
    """What the help of a command lists; nothing for a script that takes no arguments."""
    module = importlib.import_module(name_of(script).removesuffix(".py").replace("/", "."))
    if not hasattr(module, "parse_arguments"):
        return set()
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        module.parse_arguments([*subcommand, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z-]+", printed.getvalue().partition("options:")[2]))


def test_options_in_the_documentation_are_those_of_a_command():
    """`--option VALUE` in prose, whichever command it goes with."""
    scripts = [*ROOT.glob("scripts/*.py"), ROOT / "train.py", ROOT / "evaluation" / "evaluate_retrieval.py"]
    known = set().union(*map(options_of, scripts))
    known |= options_of(ROOT / "scripts" / "prepare_data.py", "coco")
    known |= options_of(ROOT / "scripts" / "prepare_data.py", "emoji")
    known |= set(re.findall(r"^ *(--[a-z-]+)\)", (ROOT / "scripts" / "demo.sh").read_text(), re.M))
    named = {
        (name_of(page), word)
        for page in PAGES
        for code in re.findall(r"(?<!`)`(--[^`\n]+)`(?!`)", page.read_text())
        for word in code.split()
        if word.startswith("--")
    }
    assert len(named) > 10
    assert {(page, option) for page, option in named if option.partition("=")[0] not in known} == set()


def test_files_that_the_readme_names_exist():
    named = re.findall(
        r"`((?:models|data|training|evaluation|scripts|configs)/[\w/.-]+\.\w+)`", (ROOT / "README.md").read_text()
    )
    assert len(named) >= 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_site_has_every_page_and_its_api_names_exist():
    nav = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(nav) == sorted(pages)
    names = [name for page in pages for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.M)]
    assert len(names) >= 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) < 180
