"""Every committed record says where it comes from."""

import json
from pathlib import Path

import pytest

from evaluation.json_fields import Fields
from evaluation.provenance import NOT_RECORDED, Provenance

ROOT = Path(__file__).parents[1] / "benchmarks" / "results"
RECORDS = [path for path in sorted(ROOT.rglob("*.json")) if path.name != "paper.json"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_record_has_a_command_and_a_machine_and_says_what_is_not_known(path):
    content = json.loads(path.read_text())
    for record in content if isinstance(content, list) else [content]:
        origin = Provenance.from_json(Fields(record, f"{path}: ").inside("provenance"))
        assert origin.machine.gpu or origin.machine.cpu != NOT_RECORDED
        gaps = NOT_RECORDED in (origin.command, origin.commit, origin.date) or not origin.versions or not origin.clean
        assert origin.note or not gaps
        assert origin.commit == NOT_RECORDED or len(origin.commit) == 40
