"""What pip installs and what continuous integration runs: one version, one list of requirements, every subpackage."""

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import models

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS = WORKFLOW["jobs"]


def requirements(name: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return sorted(line for line in lines if line)


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-emoji.txt", PROJECT["optional-dependencies"]["emoji"]),
        ("requirements-dev.txt", PROJECT["optional-dependencies"]["dev"]),
    ],
)
def test_requirement_files_list_what_the_package_declares(file, wanted):
    assert requirements(file) == sorted(wanted)


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## (\d\S*) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert PROJECT["dynamic"] == ["version"]  # read from models.__version__; the wheel's name shows it
    assert citation["version"] == models.__version__ == released[0]


def test_the_wheel_holds_every_module_of_the_library_and_its_types(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    sources = [path for path in (ROOT / "models").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    wanted = {"edje/" + path.relative_to(ROOT / "models").as_posix() for path in sources}
    assert "edje/py.typed" in wanted and "edje/encoder/joint_encoder.py" in wanted
    assert {name for name in held if ".dist-info/" not in name} == wanted
    assert wheel.name.startswith(f"edje-{models.__version__}-")


def test_every_job_has_steps_and_runs_files_that_exist():
    assert WORKFLOW[True]["push"] == {"branches": ["main"]}  # YAML 1.1 reads the key `on` as true
    for name, job in JOBS.items():
        assert {"runs-on", "steps", "timeout-minutes"} <= job.keys(), name
        for step in job["steps"]:
            assert len(step.keys() & {"run", "uses"}) == 1, step
            for file in re.findall(r"(?<![\w/])(?:\.ci|tests|configs)/[\w/.]+", step.get("run", "")):
                assert (ROOT / file).exists(), file


def test_ci_tests_every_python_that_the_package_names():
    classified = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    assert JOBS["tests"]["strategy"]["matrix"]["python"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"


def test_hooks_take_the_versions_of_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"]: hook["language"] for hook in hooks} == dict.fromkeys(["ruff", "ruff-format", "mypy"], "system")
    pinned = [line.split("==")[0] for line in requirements("requirements-dev.txt") if "==" in line]
    assert pinned == ["mypy", "ruff"]


def test_the_scripts_of_continuous_integration_are_valid_shell():
    for script in [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh")]:
        subprocess.run(["bash", "-n", script], check=True)
