"""Bad input to commands that users type: one line on stderr, exit code 2, no traceback, nothing changed."""

from pathlib import Path

import pytest

from tests.processes import ROOT, run_script

CHECKPOINT = ROOT / "configs" / "pretrained" / "scenes"


def ends_in_one_line(message: str, script: str, *arguments: str | Path) -> None:
    ended = run_script(script, *arguments)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert message in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("device", ["blah", "cuda:9"])
def test_a_device_that_is_not_there(device, run_config):
    ends_in_one_line(
        f"device is '{device}', which torch cannot use", "train.py", "--config", run_config, f"device={device}"
    )


def test_a_binary_file_as_a_configuration(scenes, annotations, tmp_path):
    image = next((scenes / "images").rglob("*.png"))
    ends_in_one_line("not a text file", "train.py", "--config", image)
    options = ["--annotations", annotations, "--root", scenes, "--out", tmp_path / "embedder"]
    ends_in_one_line("not a text file", "scripts/train_embedder.py", "--config", image, *options)


def test_an_output_that_is_a_file(run_config, scenes, annotations, tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    ends_in_one_line("taken: cannot be a directory", "train.py", "--config", run_config, f"output={taken}")
    before = (CHECKPOINT / "config.yaml").read_bytes()
    options = ["--dataset", annotations, "--data-root", scenes, "--lambda-split", "val", "--out", taken]
    ends_in_one_line(
        "taken: cannot be a directory", "evaluation/evaluate_retrieval.py", "--checkpoint", CHECKPOINT, *options
    )
    assert (CHECKPOINT / "config.yaml").read_bytes() == before


def test_other_numbers_and_names_that_lead_nowhere(scenes, tmp_path):
    options = [
        "--checkpoint",
        CHECKPOINT,
        "--images",
        scenes / "images",
        "--out",
        tmp_path / "store",
        "--batch-size",
        "0",
    ]
    ends_in_one_line("--batch-size is 0", "scripts/precompute_tokens.py", *options)
    ends_in_one_line("nope.md: no such document", "scripts/docs_tables.py", "--check", "nope.md")
