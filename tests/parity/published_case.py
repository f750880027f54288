"""One directory of tests/parity, imported: model, inputs and the outputs that it must reproduce."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoints.published import read_published
from models.edje import EDJE
from models.encoder.packing import PackedInput
from models.language.captions import CaptionIds
from models.state_dicts import load_state

PARITY = Path(__file__).parent
CASES = ("tiny_local", "tiny_m4", "tiny_m7", "tiny_long", "tiny_bf16")


class PublishedCase:
    def __init__(self, name: str):
        folder = PARITY / name
        published = read_published(folder / "checkpoint.safetensors", folder / "config.json")
        self.model = EDJE(published.config, published.tokenizer).eval()
        ours_alone = {key: value for key, value in self.model.state_dict().items() if "." not in key}
        load_state(self.model, published.state | ours_alone)
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.json = json.loads((folder / "inputs.json").read_text())

    @property
    def raw_captions(self) -> list[str]:
        return self.json["raw_captions"]

    def pack_own_pairs(self, captions: CaptionIds, tokens: Tensor) -> PackedInput:
        """Caption i with image i."""
        index = torch.arange(len(tokens))
        return self.model.encoder.pack_pairs(captions, tokens, index, index)

    def joint_pieces(self) -> CaptionIds:
        return self.model.tokenizer(self.raw_captions, max_pieces=61)

    def masked_pieces(self) -> Tensor:
        """[sum of caption lengths] bool: which word pieces `mlm_labels` asks for."""
        labels, lengths = self.inputs["mlm_labels"], self.joint_pieces().lengths.tolist()
        return torch.cat([labels[i, 1 : 1 + length] != -100 for i, length in enumerate(lengths)])

    def same_image(self) -> Tensor:
        """[B, B] bool: equal image ids; without ids, the row itself."""
        ids = self.json["image_ids"] or list(range(len(self.raw_captions)))
        return torch.tensor([[one == other for other in ids] for one in ids])

    def same_caption(self) -> Tensor:
        """[B, B] bool: equal canonical captions."""
        return torch.tensor([[one == other for other in self.json["captions"]] for one in self.json["captions"]])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """The tolerance that the origin's own float64 differs by (README.md)."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
