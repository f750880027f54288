"""EDJE: adapter, joint encoder and heads; what turns captions and vision tokens into match logits.

Letters: B, N images, C captions, Q pairs, P patch tokens, Dv patch width, De embedding width, m vision tokens,
H joint encoder width. Source: EDJE (arXiv 2510.06820), section 3.

    model = EDJE.from_pretrained("runs/demo")
    tokens = model.compress(patch_tokens)             # [B, P, Dv] -> [B, m, H], once an image
    logits = model.score(captions, tokens)            # B captions, [B, m, H] -> [B] float32
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints.checkpoint import CARD_FILE, read_checkpoint, weights_fingerprint, write_checkpoint
from .checkpoints.hub import locate_checkpoint, upload_checkpoint
from .checkpoints.model_card import model_card, renamed
from .config import EDJEConfig
from .encoder.joint_encoder import JointEncoder
from .errors import UserError
from .language.captions import CaptionIds, CaptionTokenizer
from .state_dicts import load_state
from .vision.adapters import build_adapter

SPECIAL_PIECES = 3
"""[CLS], [SEP] after the caption, [SEP] after the vision tokens."""


class MatchHead(nn.Module):
    """BERT pooler (dense, tanh) on [CLS], then one logit: [Q, H] -> [Q] float32. No dropout, no sigmoid."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    def pool(self, cls_QH: Tensor) -> Tensor:
        # float32: in bfloat16 two near candidates tie and their order becomes arbitrary.
        with torch.autocast(cls_QH.device.type, enabled=False):
            return torch.tanh(self.dense(cls_QH.float()))

    def forward(self, cls_QH: Tensor) -> Tensor:
        with torch.autocast(cls_QH.device.type, enabled=False):
            return self.out(self.pool(cls_QH)).squeeze(-1)


class EDJE(nn.Module):
    """The trained part of the model; the frozen backbone stays outside and is never saved with it."""

    def __init__(self, config: EDJEConfig, tokenizer: CaptionTokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.card: str | None = None
        """README.md that came with the weights. save_pretrained() and push_to_hub() keep it while the weights are those
        whose fingerprint it bears; else, and where it is None, a new one is written."""
        width = config.encoder.hidden_size
        self.adapter = build_adapter(config.adapter, config.dims, width)
        self.encoder = JointEncoder(config.encoder, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id)
        self.match_head = MatchHead(width)
        self.text_projection = nn.Linear(width, config.dims.embedding_width)
        # CLIP's initial temperature, 1/0.07; used by the image-text contrast objective alone.
        self.itc_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # A logarithm, so that one learning rate suits any scale.
        self.similarity_log_weight = nn.Parameter(torch.tensor(math.log(config.residual_similarity or 1.0)))
        if config.residual_similarity:
            # Training starts at the embedding's own ranking.
            nn.init.zeros_(self.match_head.out.weight)
            nn.init.zeros_(self.match_head.out.bias)

    @property
    def device(self) -> torch.device:
        return self.text_projection.weight.device

    @property
    def max_joint_pieces(self) -> int:
        """Word pieces of a caption in a joint input; longer captions are cut. Published: 61."""
        return self.config.max_caption_tokens - SPECIAL_PIECES

    def compress(self, patch_tokens: Tensor) -> Tensor:
        """[B, P, Dv] patch tokens of the backbone -> [B, m, H] vision tokens, in the adapter's dtype.

        SigLIP 2 L/16-384: [B, 576, 1024] -> [B, 64, 384]. Raises UserError if P or Dv is another backbone's."""
        dims = self.config.dims
        if patch_tokens.shape[1:] != (dims.num_patches, dims.patch_width):
            raise UserError(
                f"patch tokens have shape {list(patch_tokens.shape)}; this model's backbone "
                f"({self.config.backbone_fingerprint}) gives [B, {dims.num_patches}, {dims.patch_width}]"
            )
        return self.adapter(patch_tokens.to(self.text_projection.weight))

    def match_logits(
        self,
        captions: CaptionIds,
        tokens: Tensor,
        caption_index: Tensor,
        image_index: Tensor,
        similarities: Tensor | None = None,
    ) -> Tensor:
        """Match logits of any Q pairs among C captions and N images, as one batch.

        captions: C ragged captions; tokens: [N, m, H]; caption_index, image_index: [Q] int64; similarities: [Q]
        first-stage cosines, needed exactly where the model was built with residual_similarity. Returns [Q] float32.
        A pair's logit does not depend on the other pairs of the batch."""
        captions = captions.truncate(self.max_joint_pieces)
        packed = self.encoder.pack_pairs(captions, tokens, caption_index, image_index)
        logits = self.match_head(self.encoder.encode(packed, packed.cls_rows))
        if not self.config.residual_similarity:
            return logits
        if similarities is None:
            raise UserError("this model adds the first-stage similarity to its logit; pass `similarities` [Q]")
        return logits + self.similarity_log_weight.float().exp() * similarities.float()

    @property
    def similarity_weight(self) -> float:
        """What the first-stage cosine weighs in a match logit; 0 where it contains none."""
        return self.similarity_log_weight.exp().item() if self.config.residual_similarity else 0.0

    @torch.inference_mode()
    def score(self, captions: list[str], tokens: Tensor, similarities: Tensor | None = None) -> Tensor:
        """Match logits (not probabilities) of B raw captions with B images: tokens [B, m, H] -> [B] float32."""
        if len(captions) != len(tokens):
            raise UserError(f"{len(captions)} captions and {len(tokens)} images; score() takes one caption an image")
        index = torch.arange(len(captions), device=self.device)
        ids = self.tokenizer(captions).to(self.device)
        tokens = tokens.to(self.text_projection.weight)
        return self.match_logits(ids, tokens, index, index, similarities)

    def text_cls(self, captions: CaptionIds) -> Tensor:
        """[CLS] of a text-only pass, [C, H]: source of text-embedding recovery and of image-text contrast."""
        packed = self.encoder.pack_captions(captions.truncate(self.config.max_caption_tokens - 2))
        return self.encoder.encode(packed, packed.cls_rows)

    def image_cls(self, tokens: Tensor) -> Tensor:
        """[CLS] of a vision-only pass over [N, m, H], [N, H]: the image side of image-text contrast."""
        packed = self.encoder.pack_images(tokens)
        return self.encoder.encode(packed, packed.cls_rows)

    def recover_text_embedding(self, text_cls: Tensor) -> Tensor:
        """[C, H] -> [C, De], unnormalised: the prediction of text-embedding recovery."""
        return self.text_projection(text_cls)

    def optimized(self, dtype: torch.dtype | None = None) -> EDJE:
        """A frozen copy for inference: the joint encoder's weights joined and cast to `dtype`, the heads float32.

        dtype: by default the fastest that this device has (models/precision.py). Float32 agrees with this model to
        1e-5; bfloat16 within the bound that tests/models/test_joint_encoder.py states. A snapshot: later training of
        this model does not reach it, and it cannot be trained or saved."""
        frozen = copy.copy(self)
        frozen._modules = {name: module for name, module in self._modules.items() if name != "encoder"}
        frozen.encoder = self.encoder.optimized(dtype)
        return frozen.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.yaml, model.safetensors, the tokenizer and a model card (README.md: `self.card`, or a new one).

        The frozen backbone is named, never saved. Raises UserError if the directory holds anything but a checkpoint."""
        state = self.state_dict()
        write_checkpoint(directory, self.config, state, self.tokenizer, self._card(Path(directory).name, state))

    def _card(self, name: str, state: dict[str, Tensor]) -> str:
        weights = weights_fingerprint(state)
        kept = self.card is not None and weights in self.card
        return self.card if kept else model_card(self.config, name, weights=weights)

    def push_to_hub(self, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
        """Upload what save_pretrained() writes to OWNER/NAME, in one commit on branch `revision`; returns its URL.

        private: of a repository that is made by this call. The card is for that name. scripts/export_checkpoint.py
        --push puts a run's tables into it. Raises UserError if the hub refuses, or if the backbone is
        named by a path of this machine; nothing is committed then."""
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoint"
            state = self.state_dict()
            card = renamed(self._card(repo_id, state), repo_id)
            write_checkpoint(directory, self.config, state, self.tokenizer, card)
            return upload_checkpoint(directory, repo_id, private, revision)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", revision: str | None = None
    ) -> EDJE:
        """Load a checkpoint directory, a run directory's latest checkpoint, or OWNER/NAME from the Hugging Face Hub;
        float32, evaluation mode. A directory that exists wins, and is read without network.

        revision: branch, tag or commit on the Hub. Raises UserError naming the file if anything is missing, truncated,
        misshapen or not finite, or that there is neither a directory nor a repository of that name."""
        directory = locate_checkpoint(directory, revision)
        config, state, tokenizer = read_checkpoint(directory)
        model = cls(config, tokenizer)
        load_state(model, state, where=directory)
        card = directory / CARD_FILE
        # Nothing is computed from it: in another encoding it costs a few characters, not the model.
        model.card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        return model.to(device).eval()
