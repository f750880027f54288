"""Turn a checkpoint of the public EDJE implementation into one of ours.

python scripts/import_checkpoint.py edje.pth --out checkpoints/edje
python scripts/import_checkpoint.py tests/parity/tiny_m4/checkpoint.safetensors --out /tmp/tiny \
    --config tests/parity/tiny_m4/config.json

The file is a .pth or .safetensors in the layout of the Hub's shahafw/edje-vl-image-retrieval-reranker, or a directory
with one. --config gives what tensors cannot tell (head counts, activation, epsilons, vocabulary); it is needed where
the file does not name a backbone and language model that are known here. Sizes that it states must be the tensors'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checkpoints.checkpoint import weights_fingerprint
from models.checkpoints.model_card import model_card
from models.checkpoints.published import published_name, read_published
from models.edje import EDJE
from models.errors import UserError, run_entry_point
from models.state_dicts import load_state

OURS_ALONE = ("itc_logit_scale", "similarity_log_weight")
"""Parameters that the published model lacks; no published objective or logit uses them."""


def import_checkpoint(source: Path, out: Path, config_json: Path | None) -> EDJE:
    """Import `source`, write it to `out` and return the model. Raises UserError before anything is written."""
    if out.resolve() in (source.resolve(), source.parent.resolve()):
        raise UserError(f"--out {out}: what is imported lies there; choose another directory")
    config, state, tokenizer, unused = read_published(source, config_json)
    model = EDJE(config, tokenizer)
    initial = model.state_dict()
    load_state(model, state | {name: initial[name] for name in OURS_ALONE}, source, published_name)
    # Whoever trained these weights says under which licence; nobody has told us.
    model.card = model_card(config, out.name, weights=weights_fingerprint(model.state_dict()), license=None)
    model.save_pretrained(out)
    for name in unused:
        print(f"not used: {name}")
    return model


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FILE_OR_DIR", help="published checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    parser.add_argument("--config", type=Path, metavar="FILE.json", help="config.json with a vocab.txt beside it")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    model = import_checkpoint(arguments.source, arguments.out, arguments.config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.out}: {parameters:,} parameters, {model.config.num_vision_tokens} vision tokens per image")
    if not model.config.backbone.name:
        print(f"The file names no known backbone; set backbone in {arguments.out / 'config.yaml'} before using images.")


if __name__ == "__main__":
    run_entry_point(main)
