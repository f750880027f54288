"""Train and evaluate the variants of a sweep with several seeds: one table, and one plot of recall against cost.

python scripts/ablate.py configs/demo_ablations.yaml --seeds 0 1 2
python scripts/ablate.py configs/demo_ablations.yaml --only m16,local --out runs/short training.steps=100
python scripts/ablate.py configs/demo_ablations.yaml --seeds 0 1 2 --time-again      after runs side by side
python scripts/ablate.py --table benchmarks/results/demo_ablations/ablations.json    a record's table again
python scripts/ablate.py --table benchmarks/results/demo_ablations/ablations.json --only m16,m8 --draw m.svg
python scripts/ablate.py --table benchmarks/results/demo_ablations/ablations.json --against local m16 m8    differences

key=value overrides hold for all variants. Runs lie in OUT/VARIANT/seedN: what is done is skipped, what was killed
continues. What a variant starts from is trained first. The first variant is the one that the others are compared with.
Written: OUT/ablations.json, ablations.md, ablations.svg. What a sweep is: training/sweep.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.ablations import Entry, differences, plot, read_entries, table
from evaluation.figures import DIRECTIONS, EvaluationRecord, read_results
from evaluation.tables import columns_of
from models.edje import EDJE
from models.errors import UserError, run_entry_point
from models.files import write_atomically
from training.sweep import Sweep, read_sweep, run_folder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.json"


@dataclass(frozen=True)
class Runs:
    """The runs of a sweep: where they lie and how they are started."""

    sweep: Sweep
    out: Path
    overrides: Sequence[str]
    processes: int
    """Of each training and evaluation."""
    data: Sequence[str]
    """Options that name the data of an evaluation; none: the run's own."""

    def train(self, name: str, seed: int) -> EvaluationRecord:
        """Train and evaluate one variant with one seed, unless its results are there."""
        config, folder = self._write_config(name), run_folder(self.out, name, seed)
        if not (folder / RESULTS).is_file():
            self._call(name, "train.py", "--config", config, f"output={folder}", f"seed={seed}", *self.overrides)
        return self.evaluate(name, folder, folder)

    def evaluate(self, name: str, run: Path, out: Path) -> EvaluationRecord:
        """Evaluate a run, unless its results are in `out`."""
        if not (out / RESULTS).is_file():
            self._call(name, "evaluation/evaluate_retrieval.py", "--checkpoint", run, "--out", out, *self.data)
        return read_results(out / RESULTS)

    def _write_config(self, name: str) -> Path:
        """The variant's whole config as a file for train.py; an older one of other content is not written over."""
        path = self.out / name / "config.yaml"
        text = yaml.safe_dump(self.sweep.variants[name].config(self.out), sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path}: variant {name} of {self.sweep.path} is another now than when its runs began; "
                f"remove {path.parent} or choose another --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        return path

    def _call(self, name: str, script: str, *arguments: str | Path) -> None:
        """Run a script of this repository. Raises UserError that names the variant if it fails."""
        print("$", script, *arguments, flush=True)
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        status = subprocess.run([*launcher, ROOT / script, *arguments]).returncode
        if status:
            ended = f"{script} ended with exit status {status}; its message stands above"
            raise UserError(f"{self.sweep.path}: variant {name}: {ended}")


def describe(name: str, runs: Runs, seeds: Sequence[int], time_again: bool) -> Entry:
    """The entry of a variant, from all its seeds, which are trained where they are not."""
    records = [runs.train(name, seed) for seed in seeds]
    first = run_folder(runs.out, name, seeds[0])
    timed = [runs.evaluate(name, first, first / "timed")] if time_again else records
    rates = [record.pairs_per_second for record in timed if record.pairs_per_second]
    model, origin = records[0].model, timed[0].provenance
    if model is None or origin is None or len(rates) < len(timed):
        raise UserError(
            f"{first / RESULTS}: written by an older version, without its origin; remove it to evaluate again"
        )
    columns = columns_of(*(record.figures for record in records))
    return Entry(
        name=name,
        vision_tokens=model.vision_tokens,
        bytes_per_image=model.bytes_per_image,
        trained_parameters=sum(parameter.numel() for parameter in EDJE.from_pretrained(first).parameters()),
        milliseconds_per_query=1000 * records[0].k / statistics.median(rates),
        seeds=list(seeds),
        recall_at_1={
            way: {c: [r.figures.directions()[way].columns[c].metrics["R@1"] for r in records] for c in columns}
            for way in DIRECTIONS
        },
        provenance=origin,
    )


def run_sweep(runs: Runs, names: Sequence[str], seeds: Sequence[int], time_again: bool) -> list[Entry]:
    """Train, evaluate and record variants; entries in the order of `names`."""
    found: dict[str, Entry] = {}
    for name, needed in runs.sweep.in_order(names).items():
        for seed in sorted(needed - set(seeds if name in names else ())):
            runs.train(name, seed)
        if name in names:
            found[name] = describe(name, runs, seeds, time_again)
            done = [found[name].to_json() for name in names if name in found]
            write_atomically(runs.out / "ablations.json", json.dumps(done, indent=1) + "\n")
    return [found[name] for name in names]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="*", metavar="SWEEP", help="YAML file, then key=value overrides for all")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="variants, in this order (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default: runs/ablations")
    parser.add_argument("--processes", type=int, default=1, help="processes per run, one for each GPU (default: 1)")
    parser.add_argument("--dataset", help="data to evaluate on, as of evaluate_retrieval.py (default: the run's own)")
    parser.add_argument("--data-root", help="goes with --dataset")
    parser.add_argument(
        "--time-again",
        action="store_true",
        help="ms per query from one more evaluation of each variant's first seed, for runs that shared a machine",
    )
    parser.add_argument("--plot", default="", metavar="NAME,NAME", help="variants to draw (default: all)")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="run nothing; print an ablations.json")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME",
        help="with --table: differences in R@1 from the first NAME, of the other names (default: of all)",
    )
    parser.add_argument("--draw", type=Path, metavar="FILE.svg", help="with --table: write its plot too")
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.dataset) != bool(arguments.data_root):
        raise UserError("--dataset and --data-root go together; give both or neither")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.table:
        entries = read_entries(arguments.table)
        chosen = chosen_names(arguments.only, [entry.name for entry in entries], "--only")
        entries = [entry for name in chosen for entry in entries if entry.name == name]
        if arguments.draw:
            write_plot(arguments.draw, entries, arguments.plot)
        print(differences(entries, arguments.against) if arguments.against else table(entries))
        return
    overrides = [text for text in arguments.sweep if "=" in text]
    files = [text for text in arguments.sweep if "=" not in text]
    if len(files) != 1:
        raise UserError(f"{len(files)} files given; give one sweep, e.g. configs/demo_ablations.yaml")
    sweep = read_sweep(files[0])
    names = chosen_names(arguments.only, list(sweep.variants), "--only")
    chosen_names(arguments.plot, names, "--plot")
    data = ["--dataset", arguments.dataset, "--data-root", arguments.data_root] if arguments.dataset else []
    runs = Runs(sweep, arguments.out, overrides, arguments.processes, data)
    entries = run_sweep(runs, names, arguments.seeds, arguments.time_again)
    write_plot(arguments.out / "ablations.svg", entries, arguments.plot)
    write_atomically(arguments.out / "ablations.md", table(entries) + "\n")
    print(table(entries))
    print(f"Plot: {arguments.out / 'ablations.svg'}")


def chosen_names(given: str, known: Sequence[str], option: str) -> list[str]:
    """The names of a comma-separated option; all where it is empty. Raises UserError naming unknown ones."""
    names = list(dict.fromkeys(given.split(","))) if given else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} names {', '.join(unknown)}; the variants are {', '.join(known)}")
    return names


def write_plot(path: Path, entries: Sequence[Entry], only: str) -> None:
    drawn = chosen_names(only, [entry.name for entry in entries], "--plot")
    write_atomically(path, plot([entry for entry in entries if entry.name in drawn]))


if __name__ == "__main__":
    run_entry_point(main)
