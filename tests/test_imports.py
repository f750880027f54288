"""Imports run one way: models <- data <- evaluation <- training <- train.py, scripts. Read from the source, not run."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": set(),  # pip ships this folder alone, as `edje`
    "data": {"models", "data"},
    "evaluation": {"models", "data", "evaluation"},
    "training": {"models", "data", "evaluation", "training"},
    "benchmarks": {"models", "data", "evaluation", "training", "benchmarks"},
    "scripts": {"models", "data", "evaluation", "training", "benchmarks", "scripts"},
    "train.py": {"models", "data", "evaluation", "training"},
}
OURS = {"models", "data", "evaluation", "training", "benchmarks", "scripts", "train", "tests"}


def source_files(root: Path, part: str) -> list[Path]:
    return [root / part] if part.endswith(".py") else sorted((root / part).glob("**/*.py"))


def imported(path: Path, root: Path) -> Iterator[tuple[int, str, int]]:
    """Every import of a file, those inside functions too: line, absolute module name, number of leading dots."""
    package = list(path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield node.lineno, module, node.level
            # `from . import adapter` and `from models import adapter` name modules too.
            yield from ((node.lineno, f"{module}.{alias.name}", node.level) for alias in node.names)


def wrong_arrows(root: Path) -> list[str]:
    wrong = []
    for part, allowed in MAY_IMPORT.items():
        for path in source_files(root, part):
            depth = len(path.relative_to(root).parts) - 1
            for line, module, level in imported(path, root):
                top = module.split(".")[0]
                outside = level == 0 and top in OURS and top not in allowed
                if outside or level > depth:
                    wrong.append(f"{path.relative_to(root)}:{line} imports {module}")
    return sorted(set(wrong))


def cycle_of(root: Path, part: str, depth: int | None = None) -> list[str]:
    """Modules of one folder that import each other in a circle; empty where there are none.

    depth: compare names of so many parts alone, so that 2 asks whether subpackages do."""
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in source_files(root, part)}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        node = shortened(name, depth)
        targets = {shortened(module, depth) for _, module, _ in imported(path, root) if module in files}
        graph.setdefault(node, set()).update(targets - {node})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def shortened(module: str, depth: int | None) -> str:
    return ".".join(module.split(".")[:depth])


def test_imports_follow_the_arrows():
    assert wrong_arrows(ROOT) == []


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if not part.endswith(".py")])
def test_no_folder_imports_itself_in_a_circle(part, depth):
    assert cycle_of(ROOT, part, depth) == []


def planted(tmp_path: Path, **files: str) -> Path:
    for part in MAY_IMPORT:
        if part.endswith(".py"):
            (tmp_path / part).touch()
        else:
            (tmp_path / part).mkdir()
    for name, text in files.items():
        file = (tmp_path / name.replace("__", "/")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("models__edje", "from models.adapter import build_adapter"),
        ("models__edje", "from data import scenes"),
        ("models__edje", "from ..data import scenes"),
        ("data__batches", "import evaluation.metrics"),
        ("evaluation__retrieval", "def late():\n    from training.loop import train"),
        ("training__loop", "import train"),
        ("train", "from tests.models import test_parity"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, file, statement):
    assert len(wrong_arrows(planted(tmp_path, **{file: statement}))) >= 1


def test_a_circle_is_found(tmp_path):
    root = planted(
        tmp_path,
        models__a="from .b import x",
        models__b="def late():\n    from . import c",
        models__c="from .a import y",
    )
    assert set(cycle_of(root, "models")) == {"models.a", "models.b", "models.c"}
    assert wrong_arrows(root) == []


def test_a_circle_of_subpackages_is_found(tmp_path):
    files = {"models__a__one": "from ..b.two import x", "models__b__two": "", "models__b__three": "from ..a import one"}
    root = planted(tmp_path, **files)
    assert cycle_of(root, "models") == []
    assert set(cycle_of(root, "models", depth=2)) == {"models.a", "models.b"}
    assert wrong_arrows(root) == []
