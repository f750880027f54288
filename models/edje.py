"""EDJE: adapter, joint encoder and heads, as they are trained, saved and loaded.

Letters: B, N images, C captions, Q pairs, P patch tokens, Dv patch width, De embedding width, m vision tokens,
H joint encoder width. Source: EDJE (arXiv 2510.06820), section 3.

    model = EDJE.from_pretrained("runs/demo")
    tokens = model.compress(patch_tokens)             # [B, P, Dv] -> [B, m, H], once per image
    logits = model.score(captions, tokens)            # B captions, [B, m, H] -> [B] float32
"""

from __future__ import annotations

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
from .language.captions import CaptionIds, CaptionTokenizer
from .matching import MatchHead, MatchPass, OptimizedEDJE
from .state_dicts import load_state
from .vision.adapters import build_adapter


class EDJE(MatchPass, nn.Module):
    """The trained part of the model; the frozen backbone stays outside and is never saved with it."""

    encoder: JointEncoder

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

    def text_cls(self, captions: CaptionIds) -> Tensor:
        """[CLS] of a text-only pass, [C, H]: source of text-embedding recovery and of image-text contrast."""
        packed = self.encoder.pack_captions(captions.truncate(self.max_text_pieces))
        return self.encoder.encode_cls(packed)

    def image_cls(self, tokens: Tensor) -> Tensor:
        """[CLS] of a vision-only pass over [N, m, H], [N, H]: the image side of image-text contrast."""
        packed = self.encoder.pack_images(tokens)
        return self.encoder.encode_cls(packed)

    def recover_text_embedding(self, text_cls: Tensor) -> Tensor:
        """[C, H] -> [C, De], unnormalised: the prediction of text-embedding recovery."""
        return self.text_projection(text_cls)

    def optimized(self, dtype: torch.dtype | None = None) -> OptimizedEDJE:
        """A frozen copy for inference, the joint encoder in `dtype` (by default the fastest that this device has).

        Float32 agrees with this model to 1e-5; bfloat16 within encoder.optimized_encoder.BFLOAT16_BOUND."""
        return OptimizedEDJE(
            self.config,
            self.tokenizer,
            self.adapter,
            self.encoder,
            self.match_head,
            self.similarity_log_weight,
            dtype,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.yaml, model.safetensors, the tokenizer and a model card (README.md: `self.card`, or a new one).

        The frozen backbone is named, never saved. Raises UserError if the directory holds anything but a checkpoint."""
        state = self.state_dict()
        write_checkpoint(directory, self.config, state, self.tokenizer, self._card(Path(directory).name, state))

    def _card(self, name: str, state: dict[str, Tensor]) -> str:
        weights = weights_fingerprint(state)
        if self.card is not None and weights in self.card:
            return self.card
        return model_card(self.config, name, weights=weights)

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
        float32, evaluation mode. An existing directory takes precedence, and is read without network.

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
