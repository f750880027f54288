"""The files of an evaluation: results.json (for programs), results.md (for people), rankings.npz (every score), and
run.*.trec and qrels.*.trec (the rankings for other programs, see trec.py).

rankings.npz holds what the numbers follow from, so a report can be drawn again without a model:
    results, dataset = read_rankings("runs/demo/rankings.npz")
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.caption_datasets import CaptionDataset
from models.errors import UserError
from models.files import write_atomically

from .calibration import Calibration
from .figures import DIRECTIONS, EvaluationRecord
from .model_record import ModelRecord
from .provenance import Provenance
from .results import DirectionResults, Results
from .tables import markdown_report
from .trec import trec_files

DIRECTION_ARRAYS = ("query_image", "item_image", "candidates", "similarities", "logits", "first_right")


def evaluation_record(
    results: Results,
    checkpoint: str,
    dataset: str,
    split: str,
    model: ModelRecord | None = None,
    lambda_split: str = "",
    provenance: Provenance | None = None,
) -> EvaluationRecord:
    """The content of results.json. lambda_split: the split that lambda was chosen on, where it is known."""
    return EvaluationRecord(
        checkpoint=checkpoint,
        dataset=dataset,
        split=split,
        lambda_split="" if results.t2i.fusion_lambda is None else lambda_split,
        model=model,
        k=results.t2i.k,
        folds=results.t2i.folds,
        images=results.num_images,
        captions=results.num_captions,
        figures=results.figures(),
        seconds=results.seconds,
        pairs_per_second=results.pairs_per_second,
        precision=results.precision,
        subsets={name: results.subset(name).figures() for name in results.subset_names()},
        provenance=provenance,
    )


def write_results(out: str | Path, results: Results, dataset: CaptionDataset, record: EvaluationRecord) -> None:
    """Write results.json, results.md, rankings.npz and the TREC files into `out`, each in one step."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in trec_files(results, dataset):
        if text is None:  # an older evaluation's, which had a lambda
            (out / name).unlink(missing_ok=True)
        else:
            write_atomically(out / name, text)
    write_atomically(out / "rankings.npz", _rankings_bytes(results, dataset))
    write_atomically(out / "results.md", markdown_report(record))
    write_atomically(out / "results.json", json.dumps(record.to_json(), indent=1) + "\n")


def _rankings_bytes(results: Results, dataset: CaptionDataset) -> bytes:
    arrays: dict[str, Any] = {
        f"{direction}_{name}": getattr(getattr(results, direction), name)
        for direction in DIRECTIONS
        for name in DIRECTION_ARRAYS
    }
    fusion_lambda, calibration = results.t2i.fusion_lambda, results.t2i.calibration
    arrays |= {
        "root": str(dataset.root.resolve()),
        "image_ids": np.array(dataset.image_ids),
        "captions": np.array(dataset.captions),
        "caption_image": dataset.caption_image,
        "subsets": np.array([subset or "" for subset in dataset.subsets]),
        "folds": results.t2i.folds,
        "fusion_lambda": np.nan if fusion_lambda is None else fusion_lambda,
        "seconds": json.dumps(results.seconds),
        "precision": results.precision,
    }
    if calibration is not None:
        arrays |= {"calibration": json.dumps(asdict(calibration))}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_rankings(path: str | Path) -> tuple[Results, CaptionDataset]:
    """What write_results() wrote. Raises UserError naming the file if it is missing or damaged."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        directions = {
            direction: DirectionResults(
                **{name: arrays[f"{direction}_{name}"] for name in DIRECTION_ARRAYS},
                folds=int(arrays["folds"]),
                fusion_lambda=None if np.isnan(arrays["fusion_lambda"]) else float(arrays["fusion_lambda"]),
                calibration=Calibration(**json.loads(str(arrays["calibration"]))) if "calibration" in arrays else None,
            )
            for direction in DIRECTIONS
        }
        subsets = [str(name) or None for name in arrays["subsets"]]
        dataset = CaptionDataset(
            Path(str(arrays["root"])),
            arrays["image_ids"].tolist(),
            arrays["captions"].tolist(),
            arrays["caption_image"],
            subsets,
        )
        seconds, precision = json.loads(str(arrays["seconds"])), str(arrays["precision"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: missing or not readable as rankings ({error}); write it again with evaluate_retrieval.py"
        ) from None
    return Results(**directions, image_subsets=subsets, seconds=seconds, precision=precision), dataset
