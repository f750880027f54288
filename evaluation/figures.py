"""results.json: the figures of an evaluation and what they are of, as dataclasses that write and read it.

    record = read_results(Path("runs/demo/results.json"))
    record.figures.t2i.columns["reranked"].metrics["R@1"]

Recalls are in percent, intervals in percentage points. What files of older versions lack is None or empty here, and a
dash in tables. The keys of a column are those of metrics.METRICS.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from .json_fields import Fields, read_json_object
from .metrics import EXTENDED_METRICS, METRICS
from .model_record import ModelRecord
from .provenance import Provenance

COLUMNS = ("embedding", "reranked", "fused")
"""What ranks the same candidates: the first stage, the match logit alone, and logit + lambda * cosine."""
DIRECTIONS = ("t2i", "i2t")
"""Text to image: queries are captions; image to text: queries are images."""


@dataclass(frozen=True)
class Gain:
    """What a column changes of the embedding's R@1."""

    interval: tuple[float, float]
    """95%, paired bootstrap over queries."""
    helped: int | None = None
    hurt: int | None = None

    def to_json(self, prefix: str) -> dict[str, object]:
        return {
            f"{prefix}helped": self.helped,
            f"{prefix}hurt": self.hurt,
            f"{prefix}gain_R@1_ci95": list(self.interval),
        }

    @classmethod
    def from_json(cls, fields: Fields, prefix: str) -> Gain:
        keys = (f"{prefix}helped", f"{prefix}hurt")
        helped, hurt = (fields.whole(key) if key in fields else None for key in keys)
        return cls(fields.two_numbers(f"{prefix}gain_R@1_ci95"), helped, hurt)


@dataclass(frozen=True)
class ColumnFigures:
    """One column of one direction."""

    metrics: dict[str, float]
    """By Metric.name."""
    fusion_lambda: float | None = None
    """Of `fused`."""
    extended: dict[str, float] | None = None
    """By COCO's extended ground truth, keys EXTENDED_METRICS."""
    gain: Gain | None = None
    """None for the embedding."""

    def numbers(self) -> dict[str, float]:
        """The metrics, and lambda where there is one."""
        return self.metrics | ({} if self.fusion_lambda is None else {"lambda": self.fusion_lambda})

    def to_json(self) -> dict[str, object]:
        return {**self.numbers(), **({} if self.extended is None else {"eccv": self.extended})}

    @classmethod
    def from_json(cls, name: str, fields: Fields, gain: Gain | None) -> ColumnFigures:
        present = [metric.name for metric in METRICS if metric.required or metric.name in fields]
        metrics = {name: fields.number(name) for name in present}
        extended = None
        if "eccv" in fields:
            inside = fields.inside("eccv")
            extended = {name: inside.number(name) for name in EXTENDED_METRICS}
        return cls(metrics, fields.number("lambda") if name == "fused" else None, extended, gain)


@dataclass(frozen=True)
class CalibrationFigures:
    """How far probabilities are off on a split, over all candidates of its pools; each from 0 to 1.

    Before: the sigmoid of the default score itself. After: with the two numbers that were fitted on another split."""

    ece_before: float
    """Expected calibration error, calibration.BINS bins of equal width."""
    ece_after: float
    brier_before: float
    """Mean squared difference of probability and outcome."""
    brier_after: float
    split: str = ""
    """The split that the numbers were fitted on; empty: not known."""

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if value != ""}

    @classmethod
    def from_json(cls, fields: Fields) -> CalibrationFigures:
        errors = {name: fields.number(name) for name in ("ece_before", "ece_after", "brier_before", "brier_after")}
        return cls(**errors, split=fields.text("split") if "split" in fields else "")


@dataclass(frozen=True)
class DirectionFigures:
    """One direction."""

    columns: dict[str, ColumnFigures]
    """By name, in the order of COLUMNS; `fused` where there is a lambda."""
    pool_ceiling: float | None
    """Percent of the queries whose pool holds a right answer."""
    calibration: CalibrationFigures | None = None
    """None where the checkpoint was not calibrated."""

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {name: column.to_json() for name, column in self.columns.items()}
        document["pool_ceiling"] = self.pool_ceiling
        if self.calibration is not None:
            document["calibration"] = self.calibration.to_json()
        for name, column in self.columns.items():
            if column.gain is not None:
                document |= column.gain.to_json(_prefix(name))
        return document

    @classmethod
    def from_json(cls, fields: Fields, columns: tuple[str, ...]) -> DirectionFigures:
        found = {}
        for name in columns:
            inside = fields.inside(name)
            gain = None if name == "embedding" else Gain.from_json(fields, _prefix(name))
            found[name] = ColumnFigures.from_json(name, inside, gain)
        return cls(
            found,
            fields.number("pool_ceiling") if "pool_ceiling" in fields else None,
            CalibrationFigures.from_json(fields.inside("calibration")) if "calibration" in fields else None,
        )


def _prefix(column: str) -> str:
    return "" if column == "reranked" else f"{column}_"


@dataclass(frozen=True)
class PartFigures:
    """Both directions of a split, or of a subset of its queries."""

    t2i: DirectionFigures
    i2t: DirectionFigures
    rsum: dict[str, float]
    """By column: the sum of both directions' R@1, R@5 and R@10, 600 at best."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.t2i.columns)

    def directions(self) -> dict[str, DirectionFigures]:
        return {"t2i": self.t2i, "i2t": self.i2t}

    def to_json(self) -> dict[str, object]:
        return {"t2i": self.t2i.to_json(), "i2t": self.i2t.to_json(), "rsum": self.rsum}

    @classmethod
    def from_json(cls, fields: Fields) -> PartFigures:
        inside = {direction: fields.inside(direction) for direction in DIRECTIONS}
        columns = COLUMNS if any("fused" in part for part in inside.values()) else COLUMNS[:2]
        t2i, i2t = (DirectionFigures.from_json(part, columns) for part in inside.values())
        return cls(t2i, i2t, fields.numbers("rsum") if "rsum" in fields else {})


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """results.json."""

    checkpoint: str
    dataset: str
    split: str
    lambda_split: str = ""
    """Split that lambda was chosen on, where it is known."""
    model: ModelRecord | None = None
    k: int
    """Candidates reranked per query."""
    folds: int = 1
    images: int
    captions: int
    figures: PartFigures
    """Of the whole split."""
    seconds: dict[str, float] = field(default_factory=dict)
    """backbone, compress, rerank: wall-clock seconds of rank 0."""
    pairs_per_second: float | None = None
    """Reranked pairs of both directions, over all ranks."""
    precision: str = ""
    """Arithmetic of the joint encoder: float32 or bfloat16."""
    subsets: dict[str, PartFigures] = field(default_factory=dict)
    """By name: the queries of a subset of the images, among all candidates."""
    provenance: Provenance | None = None

    def to_json(self) -> dict[str, object]:
        """The document, without what this record does not know."""
        known: dict[str, object] = {
            "lambda_split": self.lambda_split,
            "model": self.model and self.model.to_json(),
            "k": self.k,
            "folds": self.folds,
            "images": self.images,
            "captions": self.captions,
            **self.figures.to_json(),
            "seconds": self.seconds,
            "pairs_per_second": self.pairs_per_second,
            "precision": self.precision,
            "subsets": {name: part.to_json() for name, part in self.subsets.items()},
            "provenance": self.provenance and self.provenance.to_json(),
        }
        names: dict[str, object] = {"checkpoint": self.checkpoint, "dataset": self.dataset, "split": self.split}
        return names | {key: value for key, value in known.items() if value not in (None, "", {})}

    @classmethod
    def from_json(cls, fields: Fields) -> EvaluationRecord:
        """Raises UserError naming the field that is missing or of another kind."""
        subsets = fields.inside("subsets") if "subsets" in fields else None
        return cls(
            checkpoint=fields.text("checkpoint"),
            dataset=fields.text("dataset"),
            split=fields.text("split"),
            lambda_split=fields.text("lambda_split") if "lambda_split" in fields else "",
            model=ModelRecord.from_json(fields.inside("model")) if "model" in fields else None,
            k=fields.whole("k"),
            folds=fields.whole("folds") if "folds" in fields else 1,
            images=fields.whole("images"),
            captions=fields.whole("captions"),
            figures=PartFigures.from_json(fields),
            seconds=fields.numbers("seconds") if "seconds" in fields else {},
            pairs_per_second=fields.number("pairs_per_second") if "pairs_per_second" in fields else None,
            precision=fields.text("precision") if "precision" in fields else "",
            subsets={name: PartFigures.from_json(subsets.inside(name)) for name in subsets} if subsets else {},
            provenance=Provenance.from_json(fields.inside("provenance")) if "provenance" in fields else None,
        )


def read_results(path: Path) -> EvaluationRecord:
    """One results.json. Raises UserError naming the file, and the field that is missing or of another kind."""
    return EvaluationRecord.from_json(read_json_object(path, "results.json of evaluation/evaluate_retrieval.py"))
