"""Commands in README, docs, configs' headers and docstrings cannot rot: files exist, options and keys are taken."""

import re
from pathlib import Path

import pytest

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
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name
