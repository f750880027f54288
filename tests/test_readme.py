"""Commands in README, docs, configs' headers and docstrings cannot rot: files exist, options and keys are taken."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from data.scenes.__main__ import main as write_scenes
from training.config import load_config

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted(ROOT.glob("scripts/*.*")),
    ROOT / "train.py",
]
COMMAND = re.compile(r"(?:python|torchrun(?: --nproc_per_node=\d+)?) ((?:-m data\.scenes|[\w/]+\.py)\b[^\n`]*)")

FIGURE = re.compile(r"-?\d+\.\d+$", re.M)
"""A score at the end of a line that the quick start prints."""


def commands():
    found = []
    for source in SOURCES:
        text = re.sub(r"\\+\n[#\s]*", " ", source.read_text())
        for match in COMMAND.finditer(text):
            command = match.group(1).split("  ")[0].split(" #")[0].split(" -->")[0]
            found.append(pytest.param(command.replace('"', "").split(), id=f"{source.name}: {command[:60]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_a_documented_command_names_files_options_and_keys_that_exist(words):
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + "/__main__.py", *words[2:]]
    script = ROOT / words[0]
    assert script.is_file()
    source = script.read_text()
    for word in words[1:]:
        option = word.strip("[]").split("=")[0]
        if option.startswith("--"):
            assert f'"{option}"' in source, f"{words[0]} has no option {option}"
    if words[0] == "train.py":
        config = words[words.index("--config") + 1]
        overrides = [w for w in words if re.fullmatch(r"[a-z_.]+=\S+", w)]
        if config.startswith("configs/") and (ROOT / config).exists():
            load_config(ROOT / config, overrides)
        else:
            assert config in ("FILE", "configs/pretrain_siglip2_l16.yaml")


def test_keys_in_the_documentation_are_keys_of_the_configuration():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "training.md").read_text()
    keys = set(re.findall(r"\b(?:model|data|negatives|objectives|training|backbone)\.[a-z_.]+(?==|`)", text))
    assert len(keys) > 8
    documented = (ROOT / "training" / "config.py").read_text() + (ROOT / "models" / "config.py").read_text()
    for key in keys:
        if not key.endswith(".py"):
            assert re.search(rf"^    {key.rsplit('.', 1)[1]}: ", documented, re.M), key


def test_files_that_the_readme_names_exist():
    named = re.findall(
        r"`((?:models|data|training|evaluation|scripts|configs)/[\w/.-]+\.\w+)`", (ROOT / "README.md").read_text()
    )
    assert len(named) >= 10
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.fixture
def checkout_with_scenes(tmp_path, monkeypatch, capsys):
    """A working directory like the checkout, with the scenes that the README's command renders."""
    command = re.search(r"^python -m data\.scenes (.+)$", (ROOT / "README.md").read_text(), re.M).group(1)
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr("sys.argv", ["data.scenes", *shlex.split(command)])
    write_scenes()
    capsys.readouterr()


@pytest.mark.usefixtures("checkout_with_scenes")
def test_the_quick_start_prints_what_the_readme_shows(capsys):
    text = (ROOT / "README.md").read_text()
    code, shown = re.search(r"\[start:quickstart\] -->\n```python\n(.+?)```\n```\n(.+?)```", text, re.S).groups()
    exec(code, {})
    printed = capsys.readouterr().out
    assert FIGURE.sub("#", printed) == FIGURE.sub("#", shown)
    # A CPU with bfloat16 computes in it; the README shows float32.
    scores, expected = ([float(score) for score in FIGURE.findall(output)] for output in (printed, shown))
    assert len(expected) == 3 and scores == pytest.approx(expected, abs=0.25)


@pytest.mark.usefixtures("checkout_with_scenes")
def test_the_examples_of_the_library_page_run_one_after_the_other():
    names = {}
    for code in re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "library.md").read_text(), re.S):
        exec(code, names)
    assert names["best"] == "scene_000040.png" and names["hits"][0]["corpus_id"] == 1
    by_id = [hit["score"] for hit in names["hits"]]
    assert names["scores"][0] == pytest.approx(by_id[0], abs=0.25)  # stored in float16, and from the image


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
