"""Write the adapter, the joint encoder with its match head, and a tokenizer for onnxruntime: rerank without torch.

python scripts/export_onnx.py --checkpoint runs/demo --out demo-onnx
python scripts/export_onnx.py --checkpoint shahafw/edje-vl-image-retrieval-reranker --out edje-onnx

It needs the extra `onnx`. onnxruntime scores random captions and tokens, and the largest difference of its logits from
torch's is printed; above 1e-4 nothing is written. docs/plugs/onnx.md shows how to serve the directory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.edje import EDJE
from models.errors import run_entry_point
from models.integrations.onnx import ADAPTER_FILE, JOINT_FILE, export_onnx


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="NAME_OR_DIR", help="checkpoint, run or Hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    difference = export_onnx(EDJE.from_pretrained(arguments.checkpoint), arguments.out)
    for name in (ADAPTER_FILE, JOINT_FILE):
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size / 1e6:.1f} MB")
    print(f"onnxruntime's logits are torch's, the largest difference being {difference:.5f}")


if __name__ == "__main__":
    run_entry_point(main)
