"""training.report_to with the real libraries, off line: each holds what metrics.jsonl holds, across a resume."""

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trackio
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

import train
import training.loop
from models.distributed import DistributedContext
from models.errors import UserError
from training.config import RunConfig, TrainingConfig, load_config
from training.run_log import RunLog
from training.trackers import TRACKERS, check_installed

Curves = dict[str, list[tuple[int, float]]]
ALL = "training.report_to=[tensorboard, wandb, trackio]"


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch) -> Path:
    """Where trackio writes; it reads TRACKIO_DIR once, when it is imported."""
    folder = tmp_path / "trackio"
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    return folder


@pytest.fixture
def run(run_config, stores, monkeypatch, trackio_folder) -> Iterator:
    """train.py in this process, off line, with all trackers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shared = [f"data.store={stores[0]}", f"data.caption_store={stores[1]}", "training.checkpoint_every=2"]

    def train_now(*overrides: str) -> None:
        arguments = ["train.py", "--config", run_config, *shared, *overrides]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        train.main()

    yield train_now
    wandb.teardown()


def logged(output: Path) -> Curves:
    curves: Curves = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name if "/" in name else f"train/{name}", []).append((line["step"], value))
    return curves


def on_tensorboard(output: Path) -> Curves:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def records(content: bytes) -> Iterator[bytes]:
    """Of a LevelDB log, as wandb writes it behind a header of 7 bytes: blocks of 32 KiB; each piece of a record has a
    checksum (4 bytes), a length (2) and whether it is whole (1), the first (2), a middle (3) or the last (4)."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def on_wandb(output: Path) -> tuple[Curves, set[str]]:
    """Curves and ids of the runs in OUTPUT/wandb, in the order of time."""
    curves: Curves = {}
    files = sorted((output / "wandb").glob("offline-run-*/*.wandb"))
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    if not name.startswith("_"):
                        curves.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return curves, {file.stem for file in files}


def on_trackio() -> tuple[Curves, list[str]]:
    """Curves of the one run of project `edje`, and the names of all its runs."""
    runs = list(trackio.Api().runs("edje"))
    curves: Curves = {}
    for row in trackio.sqlite_storage.SQLiteStorage.get_logs("edje", runs[0].name):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                curves.setdefault(name, []).append((row["step"], value))
    return curves, [run.name for run in runs]


def assert_same(found: Curves, wanted: Curves, but: tuple[str, ...] = ()) -> None:
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        if name not in but:
            assert [step for step, _ in found[name]] == [step for step, _ in points], name
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def test_a_killed_and_resumed_run_has_one_curve_of_the_same_scalars_everywhere(run, tmp_path, monkeypatch):
    """Stopped after step 3 was logged and step 2 saved: step 3 comes twice, and is on every curve once."""
    output, step_of = tmp_path / "run", training.loop.optimizer_step

    def stopped_at_four(state, *rest):
        if state.step == 3:
            raise KeyboardInterrupt
        return step_of(state, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.loop, "optimizer_step", stopped_at_four)
        run(ALL, "training.steps=6", "data.val_split=val", "training.evaluate_every=2")
    wandb.finish()  # as wandb does when a process ends
    trackio.finish()
    run(ALL, "training.steps=6", "data.val_split=val", "training.evaluate_every=2")
    wanted = logged(output)
    assert [step for step, _ in wanted["train/itm"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in wanted["val/t2i/fused/R@1"]] == [2, 4, 6]
    assert_same(on_tensorboard(output), wanted)
    timed = ("train/samples_per_second", "train/waiting_share")  # of step 3, from before the stop
    (curves, ids), (rows, names) = on_wandb(output), on_trackio()
    assert_same(curves, wanted, but=timed)
    assert_same(rows, wanted, but=timed)
    [name] = names
    assert ids == {f"run-{name.rpartition('-')[2]}"} and name == (output / "run_id").read_text().strip()


def test_a_run_reports_nowhere_unless_it_is_told(run, tmp_path, trackio_folder):
    run("training.steps=1")
    assert TrainingConfig().trackers == ()
    assert logged(tmp_path / "run")["train/itm"]
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert not files & {"tensorboard", "wandb", "run_id"} and not trackio_folder.exists()


def test_only_the_main_rank_reports(tmp_path, trackio_folder):
    config = RunConfig(output=str(tmp_path / "run"), training=TrainingConfig(report_to=TRACKERS))
    log = RunLog(config, 0, DistributedContext(rank=1, size=2))
    log._record(1, {"itm": 1.0})
    log.close([])
    assert log.trackers == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value, message",
    [
        ("tensorbord", "training.report_to is 'tensorbord'; did you mean 'tensorboard'?"),
        ("[wandb, trakio]", r"training.report_to is \('wandb', 'trakio'\); did you mean 'trackio'?"),
        ("mlflow", "training.report_to is 'mlflow'; expected none, tensorboard, wandb, trackio or a list of these"),
        ("3", "'training.report_to' is 3; expected a string"),
    ],
)
def test_an_unknown_tracker_is_named_with_the_nearest(run_config, value, message):
    with pytest.raises(UserError, match=message):
        load_config(run_config, [f"training.report_to={value}"])


def test_a_list_may_be_empty_or_repeat_itself():
    assert TrainingConfig(report_to=()).trackers == ()
    assert TrainingConfig(report_to=("wandb", "wandb")).trackers == ("wandb",)


def test_a_missing_package_is_one_line_before_anything_is_read(run, tmp_path, monkeypatch):
    """A folder that the tracker left in the working directory is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])
    )
    for name in TRACKERS:
        with pytest.raises(UserError, match=rf'names {name}, which is not installed; .* pip install "edje\[{name}\]"'):
            check_installed([name])
    with pytest.raises(UserError, match="names wandb, which is not installed"):
        run("training.report_to=wandb", "data.annotations=no_such_file.json")


@pytest.mark.parametrize("variable, value", [("WANDB_MODE", "no-such-mode"), ("WANDB_MODE", "online")])
def test_a_tracker_that_cannot_start_is_one_line(run, tmp_path, monkeypatch, variable, value):
    """A setting that wandb does not know; an account that is not there."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match="training.report_to: wandb did not start .*set WANDB_MODE=offline"):
        run("training.report_to=wandb", "training.steps=1")
