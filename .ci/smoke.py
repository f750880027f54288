"""Rank two images by a caption with the installed package: python -P .ci/smoke.py configs/pretrained/scenes"""

import sys

import edje
from PIL import Image

if __name__ == "__main__":
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    ranked = edje.Reranker.from_pretrained(sys.argv[1]).rank("a red circle", images)
    assert sorted(result["corpus_id"] for result in ranked) == [0, 1], ranked
    print(f"edje {edje.__version__} from {edje.__file__} ranked {len(ranked)} images")
