"""From captions and vision tokens to match logits: the mathematics of EDJE, and its form for inference.

`MatchPass` holds what both forms compute. `models.edje.EDJE` runs it on parameters: it trains, is saved and loaded.
`OptimizedEDJE` runs it on a frozen copy whose joint encoder is prepared for speed: it scores, and does nothing else.

Letters: B, N images, C captions, Q pairs, P patch tokens, Dv patch width, De embedding width, m vision tokens,
H joint encoder width. Source: EDJE (arXiv 2510.06820), section 3.
"""

from __future__ import annotations

import copy
from abc import ABC
from typing import NoReturn

import torch
from torch import Tensor, nn

from .checkpoints.checkpoint import adapter_fingerprint
from .config import EDJEConfig
from .encoder.encoder_pass import EncoderPass
from .encoder.joint_encoder import JointEncoder
from .errors import UserError
from .language.captions import CaptionIds, CaptionTokenizer

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


class MatchPass(ABC):
    """What EDJE computes, with the parts that a subclass holds."""

    config: EDJEConfig
    tokenizer: CaptionTokenizer
    adapter: nn.Module
    encoder: EncoderPass
    match_head: MatchHead
    similarity_log_weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.match_head.dense.weight.device

    @property
    def max_joint_pieces(self) -> int:
        """Word pieces of a caption in a joint input; longer captions are cut. Published: 61."""
        return self.config.max_caption_tokens - SPECIAL_PIECES

    @property
    def max_text_pieces(self) -> int:
        """The same in a text-only input, which has no vision tokens to end."""
        return self.max_joint_pieces + 1

    @property
    def adapter_fingerprint(self) -> str:
        """16 hex digits of the adapter that stored tokens belong to (checkpoints/checkpoint.py)."""
        state = {f"adapter.{name}": tensor for name, tensor in self.adapter.state_dict().items()}
        return adapter_fingerprint(self.config, state)

    def compress(self, patch_tokens: Tensor) -> Tensor:
        """[B, P, Dv] patch tokens of the backbone -> [B, m, H] vision tokens, in the adapter's dtype.

        SigLIP 2 L/16-384: [B, 576, 1024] -> [B, 64, 384]. Raises UserError if P or Dv is another backbone's."""
        dims = self.config.dims
        if patch_tokens.shape[1:] != (dims.num_patches, dims.patch_width):
            raise UserError(
                f"patch tokens have shape {list(patch_tokens.shape)}; this model's backbone "
                f"({self.config.backbone_fingerprint}) gives [B, {dims.num_patches}, {dims.patch_width}]"
            )
        tokens: Tensor = self.adapter(patch_tokens.to(self.match_head.dense.weight))
        return tokens

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
        if not len(caption_index):
            return self.similarity_log_weight.new_zeros(0)
        captions = captions.truncate(self.max_joint_pieces)
        packed = self.encoder.pack_pairs(captions, tokens, caption_index, image_index)
        return self.logits_of(self.encoder.encode_cls(packed), similarities)

    def logits_of(self, cls: Tensor, similarities: Tensor | None = None) -> Tensor:
        """[CLS] states of joint inputs [Q, H] -> match logits [Q] float32; similarities: as for match_logits."""
        logits: Tensor = self.match_head(cls)
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
            raise UserError(f"{len(captions)} captions and {len(tokens)} images; score() takes one caption per image")
        index = torch.arange(len(captions), device=self.device)
        ids = self.tokenizer(captions).to(self.device)
        tokens = tokens.to(self.match_head.dense.weight)
        return self.match_logits(ids, tokens, index, index, similarities)


class OptimizedEDJE(MatchPass):
    """A frozen copy of an EDJE for inference: the joint encoder's weights joined and cast, adapter and head float32.

    It shares no memory with the model that it was made from: neither sees what later happens to the other. It is no
    nn.Module, for its encoder's weights lie in a form that no checkpoint has: train or save the EDJE itself."""

    def __init__(
        self,
        config: EDJEConfig,
        tokenizer: CaptionTokenizer,
        adapter: nn.Module,
        encoder: JointEncoder,
        match_head: MatchHead,
        similarity_log_weight: Tensor,
        dtype: torch.dtype | None = None,
    ):
        """dtype: of the joint encoder's matrix products, by default the device's fastest (models/precision.py)."""
        self.config, self.tokenizer = config, tokenizer
        self.adapter = copy.deepcopy(adapter).requires_grad_(False).eval()
        self.match_head = copy.deepcopy(match_head).requires_grad_(False).eval()
        self.encoder = encoder.optimized(dtype)
        self.similarity_log_weight = similarity_log_weight.detach().clone()

    def __getattr__(self, name: str) -> NoReturn:
        """Only for what it does not have: says so, where a user expects a trainable model."""
        what_to_do = "; train or save the model itself: EDJE.from_pretrained(...)" if hasattr(nn.Module, name) else ""
        if name in ("save_pretrained", "push_to_hub"):
            what_to_do = "; load the model with EDJE.from_pretrained(...) and save that"
        raise AttributeError(f"OptimizedEDJE, a frozen copy for inference, has no {name}{what_to_do}")
