"""Turn a checkpoint of the public EDJE implementation into one of ours.

python scripts/import_checkpoint.py edje.pth --out checkpoints/edje
python scripts/import_checkpoint.py tests/parity/tiny_m4/checkpoint.safetensors --out /tmp/tiny \
    --config tests/parity/tiny_m4/config.json
With open_clip's form of the same backbone:
python scripts/import_checkpoint.py edje.pth --out checkpoints/edje --backbone-name ViT-L-16-SigLIP2-384 \
    --backbone-pretrained webli

Every command that takes a --checkpoint also takes published weights as they are; this one is for a copy to keep, train
on or change. The file is a .pth or .safetensors in the layout of shahafw/edje-vl-image-retrieval-reranker on the Hub,
the index of such files, or a directory with them. --config gives what tensors cannot tell (head counts, activation,
epsilons, vocabulary), by default the config.json beside the file; it is needed where the file does not name a backbone
and language model that are known here. Sizes that it states must be the tensors'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checkpoints.conversion import convert
from models.config import BackboneConfig
from models.edje import EDJE
from models.errors import UserError, run_entry_point


def import_checkpoint(
    source: Path, out: Path, config_json: Path | None = None, backbone: BackboneConfig | None = None
) -> EDJE:
    """Import `source`, write it to `out` and return the model. Raises UserError before anything is written."""
    if out.resolve() in (source.resolve(), source.parent.resolve()):
        raise UserError(f"--out {out}: what is imported lies there; choose another directory")
    published = convert(source, out, config_json, backbone)
    for name in published.unused:
        print(f"not used: {name}")
    return EDJE.from_pretrained(out)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FILE_OR_DIR", help="published checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    parser.add_argument("--config", type=Path, metavar="FILE.json", help="config.json with a vocab.txt beside it")
    parser.add_argument("--backbone-name", default="", help="backbone to name instead of the one that the weights name")
    parser.add_argument("--backbone-pretrained", default="", help="its open_clip tag, file or directory")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    backbone = None
    if arguments.backbone_name or arguments.backbone_pretrained:
        backbone = BackboneConfig(name=arguments.backbone_name, pretrained=arguments.backbone_pretrained)
    model = import_checkpoint(arguments.source, arguments.out, arguments.config, backbone)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.out}: {parameters:,} parameters, {model.config.num_vision_tokens} vision tokens per image")
    if not (model.config.backbone.name or model.config.backbone.pretrained):
        print(f"The file names no known backbone; set backbone in {arguments.out / 'config.yaml'} before using images.")


if __name__ == "__main__":
    run_entry_point(main)
