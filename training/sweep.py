"""A sweep: one config and its named variants in one file, e.g. configs/demo_ablations.yaml.

    base: demo.yaml                                     # a run's config, beside this file
    variants:
      local: {model: {adapter: {kind: local}}}          # keys of a run's config over those of `base`
      m16:
        like: local                                     # over those of another variant instead
        model: {init_from: run:local/seed0, adapter: {kind: compression}}

`run:NAME/seedN` stands for the directory of that variant's run with that seed, which therefore is trained first.

    sweep = read_sweep("configs/demo_ablations.yaml")
    sweep.in_order(["m16"])                             # {"local": {0}, "m16": set()}
    sweep.variants["m16"].config(Path("runs/ablations"))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from models.config_io import unknown_key
from models.errors import UserError

from .config import merge, read_with_base

REFERENCE = re.compile(r"run:(?P<variant>[\w.-]+)/seed(?P<seed>\d+)")
NAME = re.compile(r"[\w.-]*\w")


@dataclass(frozen=True)
class Variant:
    """One variant with everything that it inherits."""

    name: str
    keys: dict[str, object]
    """A run's config as a mapping, references in place."""

    @property
    def starts(self) -> dict[str, set[int]]:
        """Runs that it starts from: variants and their seeds."""
        found: dict[str, set[int]] = {}
        for value in _texts(self.keys):
            if match := REFERENCE.fullmatch(value):
                found.setdefault(match["variant"], set()).add(int(match["seed"]))
        return found

    def config(self, runs: Path) -> dict[str, object]:
        """The run's config; runs: the folder of all variants' runs, which references are resolved to."""
        return {key: _resolved(value, runs) for key, value in self.keys.items()}


@dataclass(frozen=True)
class Sweep:
    """The variants of one file, in its order."""

    path: Path
    variants: dict[str, Variant]

    def in_order(self, names: Iterable[str]) -> dict[str, set[int]]:
        """The variants of these names and those that they start from, first what others start from; with each the seeds
        that others need of it.

        Raises UserError naming a variant that does not exist."""
        graph: dict[str, set[str]] = {}
        needed: dict[str, set[int]] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop(0)
            if name in graph:
                continue
            if name not in self.variants:
                raise UserError(f"{self.path}: {unknown_key(name, list(self.variants))}")
            starts = self.variants[name].starts
            graph[name] = set(starts)
            needed.setdefault(name, set())
            for start, seeds in starts.items():
                needed.setdefault(start, set()).update(seeds)
            waiting += starts
        try:
            return {name: needed[name] for name in TopologicalSorter(graph).static_order()}
        except CycleError as error:
            raise UserError(f"{self.path}: variants start from each other: {' -> '.join(error.args[1])}") from None


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep. Raises UserError naming the file and the key or variant."""
    path = Path(path)
    content = read_with_base(path, inherit=False)
    for key in content:
        if key not in ("base", "variants"):
            raise UserError(f"{path}: {unknown_key(key, ['base', 'variants'])}; a sweep has a base and variants")
    variants, base = content.get("variants"), content.get("base")
    if not isinstance(variants, dict) or not variants or not isinstance(base, str):
        raise UserError(
            f"{path}: not a sweep; expected `base: CONFIG.yaml` and `variants:`, a mapping of names to keys"
        )
    inherited = read_with_base(path.parent / base)
    found = {name: Variant(name, merge(inherited, _keys_of(name, variants, path))) for name in variants}
    return Sweep(path, found)


def _keys_of(name: str, variants: Mapping[str, object], path: Path, below: tuple[str, ...] = ()) -> dict[str, object]:
    """The keys of a variant over those that `like` names. below: the variants on the way here."""
    keys = variants.get(name)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{path}: the variant {name!r} cannot name a folder; use letters, digits, `_`, `-` and `.`")
    if not isinstance(keys, dict):
        raise UserError(f"{path}: variant {name} is {keys!r}; expected a mapping of keys to values")
    like = keys.get("like")
    if like is None:
        return keys
    if like not in variants or like in (*below, name):
        raise UserError(f"{path}: variant {name} is like {like!r}; expected another variant, and no circle")
    own = {key: value for key, value in keys.items() if key != "like"}
    return merge(_keys_of(like, variants, path, (*below, name)), own)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _resolved(value: object, runs: Path) -> object:
    if isinstance(value, dict):
        return {key: _resolved(part, runs) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolved(part, runs) for part in value]
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return str(run_folder(runs, match["variant"], int(match["seed"]))) if match else value


def run_folder(runs: Path, variant: str, seed: int) -> Path:
    """Where a variant's run with a seed lies."""
    return runs / variant / f"seed{seed}"
