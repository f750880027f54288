"""Every block of README, CONTRIBUTING and docs does what it says: a page is a session that a reader types, top down.

Python runs and prints what the page shows; data files and configurations are read; shell commands run, or are started
dry where a list below says why. Commands in prose, docstrings and headers are started dry too."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.caption_datasets import load_annotations
from data.named_datasets import NAMED_DATASETS, SPLITS
from models.errors import UserError
from scripts.prepare_data import next_commands
from tests.documentation import (
    PAGES,
    ROOT,
    Block,
    blocks,
    command_module,
    commands_of,
    mentioned_commands,
    name_of,
    on_one_process,
    start_dry,
)
from tests.hub_stand_in import HubStandIn, Repository
from tests.tiny_transformers import write_siglip
from training.config import load_config

DRY = {
    "pip install *": "changes the environment",
    "bash scripts/*.sh*": "trains for minutes, or runs the tests",
    "bash .ci/run": "runs the tests",
    "python scripts/docs_tables.py": "rewrites the pages; tests/test_docs_tables.py runs it on copies",
    "python train.py *": "trains for minutes or days",
    "python scripts/ablate.py *": "trains for hours",
    "python scripts/benchmark.py *": "measures for minutes",
    "python scripts/precompute_tokens.py --backbone-name *": "needs a download",
    "python scripts/precompute_tokens.py --checkpoint runs/*": "needs a trained run",
    "python evaluation/evaluate_retrieval.py *": "needs a trained run",
    "python scripts/results_table.py *runs*": "needs a trained run",
    "python scripts/scene_*.py *": "needs the demo's run",
    "python scripts/export_checkpoint.py runs/NAME *": "needs a trained run, and uploads",
    "python scripts/import_checkpoint.py CHECKPOINT.pth *": "needs a download",
    "python scripts/prepare_data.py *": "needs a download",
}
"""Commands of blocks that are started dry, as patterns, and why; torchrun's are written as one process's."""

COMPILED_ONLY = {"mteb.evaluate(model, tasks, num_proc=4)": "downloads data sets"}
"""What marks a block of Python that is not run, and why."""

OTHER_TOOLS = {".venv/bin/mkdocs build --strict": "needs the extra docs"}
"""Commands that are not ours, and why they do not run."""

NOT_RUN = {"bibtex": "is for a bibliography"}
"""Languages of blocks that nothing runs, and why."""

PUBLISHED, TOWER = "shahafw/edje-vl-image-retrieval-reranker", "google/siglip2-large-patch16-384"

DECIMAL = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Iterator[HubStandIn]:
    """The Hub with what the pages load from it, of the same layout and tiny."""
    tower = write_siglip(tmp_path_factory.mktemp("hub") / "tower", hidden_size=24, patch_size=16)
    case = ROOT / "tests" / "parity" / "tiny_m4"
    published = [case / name for name in ("checkpoint.safetensors", "config.json", "vocab.txt")]
    with HubStandIn() as hub:
        for name, files in ((PUBLISHED, published), (TOWER, tower.iterdir())):
            hub.repositories[name] = Repository()
            hub.repositories[name].commit("main", {file.name: file.read_bytes() for file in files})
        yield hub


@pytest.fixture
def workplace(hub, tmp_path, monkeypatch) -> None:
    """The working directory of a reader who has photos and followed the quick start; the CPU computes in float32."""
    hub.stand_in(monkeypatch, tmp_path / "cache" / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    readme = [command for block in blocks(ROOT / "README.md") for command in commands_of(block)]
    [render] = [command for command in readme if command.startswith("python -m data.scenes")]
    run_command(render)
    shutil.copytree("scenes/images/test", "photos")


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_blocks_of_a_page_run_one_after_the_other_and_print_what_it_shows(page):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        match block.language:
            case "python":
                printed = run_python(block, names)
            case "bash":
                printed = "".join(run_command(command) for command in commands_of(block))
            case "json":
                printed = read_annotations(block)
            case "yaml":
                printed = read_config(block)
            case language:
                assert language in NOT_RUN, f"{block.place}: nothing runs a block of {language or 'no language'}"
                continue
        if block.output is not None:
            assert_printed(block, printed)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "plugs"], ids=name_of)
def test_the_page_of_a_plug_installs_it_and_shows_what_it_prints(page):
    shown = blocks(page)
    assert any(command.startswith("pip install ") for block in shown for command in commands_of(block))
    assert any(block.output for block in shown if block.language in ("python", "bash"))


def run_python(block: Block, names: dict[str, object]) -> str:
    """Execute a block where the page's earlier blocks left off. Lines of a traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    if any(mark in block.text for mark in COMPILED_ONLY):
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


def run_command(command: str) -> str:
    """Run a command in this process, or start it dry where DRY says so; what it printed."""
    if command in OTHER_TOOLS:
        return ""
    if matching(command):
        start_dry(command)
        return ""
    words = on_one_process(shlex.split(command))
    module, arguments = command_module(words[1:])
    arguments = [file for word in arguments for file in sorted(glob.glob(word)) or [word]]
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [words[1], *arguments])
        module.main()
    return printed.getvalue()


def matching(command: str) -> list[str]:
    """The patterns of DRY that a command is listed by."""
    plain = " ".join(on_one_process(shlex.split(command)))
    return [pattern for pattern in DRY if fnmatch.fnmatchcase(plain, pattern)]


def read_annotations(block: Block) -> str:
    file = Path("annotations.json")
    file.write_text(block.text)
    assert load_annotations(file, file.parent, split=None).captions, block.place
    return ""


def read_config(block: Block) -> str:
    file = Path("config.yaml")
    file.write_text(block.text)
    load_config(file)
    return ""


def assert_printed(block: Block, printed: str) -> None:
    """The page's text to the letter; a decimal may be off by one in the last place that the page shows."""
    assert block.output is not None
    told = f"{block.place} prints:\n{printed}"
    assert DECIMAL.sub("#", printed) == DECIMAL.sub("#", block.output), told
    for found, shown in zip(DECIMAL.findall(printed), DECIMAL.findall(block.output), strict=True):
        last_place = 10.0 ** -len(shown.partition(".")[2])
        assert abs(float(found) - float(shown)) < 1.01 * last_place, told


def test_every_entry_of_the_lists_is_used():
    shown = [block for page in PAGES for block in blocks(page)]
    commands = [command for block in shown for command in commands_of(block)]
    assert {pattern for command in commands for pattern in matching(command)} == set(DRY)
    assert set(OTHER_TOOLS) <= set(commands)
    assert all(any(mark in block.text for block in shown) for mark in COMPILED_ONLY)
    assert set(NOT_RUN) <= {block.language for block in shown}


MENTIONED = {command: source for source, command in mentioned_commands()}


@pytest.mark.parametrize(
    "command", [pytest.param(command, id=f"{name_of(source)}: {command}") for command, source in MENTIONED.items()]
)
def test_a_command_in_prose_a_docstring_or_a_header_starts(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    start_dry(command)


def test_commands_are_found_in_prose_docstrings_and_headers():
    sources = {source.suffix for source in MENTIONED.values()}
    assert sources == {".md", ".py", ".sh", ".yaml"} and len(MENTIONED) > 60


@pytest.mark.parametrize("name", NAMED_DATASETS)
def test_what_a_complete_download_is_told_to_run_next_starts(name, tmp_path):
    (tmp_path / NAMED_DATASETS[name].karpathy_file).touch()
    lines = next_commands(name, tmp_path, list(SPLITS), tmp_path)
    commands = [line.strip() for line in lines if line.startswith("  ")]
    assert len(commands) == 4
    for command in commands:
        start_dry(command)


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/benchmark.py --nly rerank",
        "python train.py --config configs/demo.yaml training.step=3",
        "python train.py --config configs/dmo.yaml",
        "python scripts/no_such_script.py",
        "python scripts/ablate.py configs/demo_ablations.yaml --only m17",
        "python scripts/ablate.py configs/demo_ablations.yaml training.step=3",
        "python scripts/train_embedder.py --config configs/demo.yaml --annotations a.json --root . --out b",
        "torchrun --nprc_per_node=8 train.py --config configs/demo.yaml",
        "bash scripts/demo.sh training.step=3",
        "bash scripts/emoji.sh DATA_ROOT frzen",
        "bash scripts/test.sh tests/no_such_folder",
        "bash scripts/test.sh --no-such-option",
        "pip install -r requirement.txt",
        "pip install '.[no-such-extra]'",
        "pip install no-such-package",
        "npm install edje",
    ],
)
def test_a_command_that_is_wrong_does_not_start(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, UserError)):
        start_dry(command)
