"""The README.md of a checkpoint: the Hub's metadata, what it needs, how it is used, what was measured, its limits.

Metadata: huggingface_hub's model card specification. `pipeline_tag: text-ranking` is the Hub's task of rerankers: a
query and candidates in, their order out, as sentence-transformers' CrossEncoder has it, which Reranker.rank follows.
Of the others, zero-shot-image-classification promises class probabilities from an embedding model,
visual-document-retrieval pages of documents, image-text-to-text generated text. The tags say that candidates are
images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..config import BackboneConfig, EDJEConfig
from ..vision.backbones import hub_repository, is_of_transformers

PIPELINE_TAG = "text-ranking"
LICENSE = "bsd-3-clause"
"""Of weights that this code trained, unless their owner says otherwise."""
TAGS = ("reranking", "image-text-retrieval", "text-to-image-retrieval", "vision-language", "cross-encoder", "edje")
BACKBONE_REPOSITORIES = {
    ("ViT-B-16-quickgelu", "openai"): "timm/vit_base_patch16_clip_224.openai",
    ("ViT-L-14-quickgelu", "openai"): "timm/vit_large_patch14_clip_224.openai",
    ("ViT-L-14-336-quickgelu", "openai"): "timm/vit_large_patch14_clip_336.openai",
    ("ViT-L-14-quickgelu", "dfn2b"): "apple/DFN2B-CLIP-ViT-L-14",
    ("ViT-L-14-quickgelu", "metaclip_fullcc"): "timm/vit_large_patch14_clip_224.metaclip_2pt5b",
    ("ViT-B-16-SigLIP2-384", "webli"): "timm/ViT-B-16-SigLIP2-384",
    ("ViT-L-16-SigLIP2-384", "webli"): "timm/ViT-L-16-SigLIP2-384",
}
"""Where the Hub has the paper's backbones, by open_clip name and tag."""
_CARD = """\
---
{metadata}---

# {name}

[EDJE](https://arxiv.org/abs/2510.06820) reranks images with text: a joint encoder of {layers} layers scores a
caption with {tokens} vision tokens of width {width} per image, which are computed once and stored.

## Use

```python
from edje import Reranker
reranker = Reranker.from_pretrained("{name}")
reranker.rank("a red ball", ["one.jpg", "two.jpg"])     # [{{"corpus_id": ..., "score": ...}}, ...], best first
```

## Needs

{backbone}

The backbone is frozen and not part of this checkpoint. {fingerprint}

## Measured

{measured}

## Limits

- Scores are match logits: they order the candidates of one query, and are no probabilities.
- It reorders what a first stage found; an image outside its pool stays outside.
- Captions are lower-cased, stripped of punctuation, and cut to {pieces} word pieces.
- Stored tokens belong to this adapter and backbone: after a change of either, images are indexed again.
- What the backbone and the training captions do not tell apart, or are biased in, shows in the order.
{more_limits}"""


def model_card(
    config: EDJEConfig,
    name: str,
    measured: Sequence[str] = (),
    datasets: Sequence[str] = (),
    base_models: Sequence[str] = (),
    weights: str = "",
    license: str | None = LICENSE,
    results: Sequence[EvalResult] = (),
) -> str:
    """The text of README.md. `measured`: Markdown tables of evaluations; none: the card says that it has none.

    results: the same figures for programs, as the Hub shows and searches them.
    datasets: what it was trained on; base_models: Hub names of what it started from, beside the backbone that the
    config names. weights: their fingerprint, by which a card is known to belong to a model. license: of the weights,
    by the Hub's name; None: not known, and left out."""
    backbone, encoder = config.backbone, config.encoder
    repository = BACKBONE_REPOSITORIES.get((backbone.name, backbone.pretrained)) or hub_repository(backbone)
    metadata = ModelCardData(
        license=license,
        library_name="edje",
        pipeline_tag=PIPELINE_TAG,
        base_model=[*([repository] if repository else []), *base_models] or None,
        datasets=list(datasets) or None,
        metrics=["recall"] if measured else None,
        tags=list(TAGS),
        model_name=name,
        eval_results=list(results) or None,
    )
    return _CARD.format(
        metadata=f"{metadata.to_yaml()}\n",
        name=name,
        layers=encoder.num_layers,
        tokens=config.num_vision_tokens,
        width=encoder.hidden_size,
        backbone=_describe(backbone),
        fingerprint=_fingerprint(config.backbone_fingerprint),
        measured="\n\n".join([*measured] or ["No evaluation is recorded with this checkpoint."]) + _of_weights(weights),
        pieces=config.max_caption_tokens - 3,  # [CLS] and two [SEP]
        more_limits=_RESIDUAL if config.residual_similarity else "",
    )


def renamed(card: str, name: str) -> str:
    """A card for the same weights under another name: title, code example, and the metadata's entry of its figures."""
    old = re.search(r'from_pretrained\("([^"]+)"\)', card)
    if old is None:
        return card
    for form in ('from_pretrained("{}")', "\n# {}\n", "\n- name: {}\n"):
        card = card.replace(form.format(old[1]), form.format(name))
    return card


def _fingerprint(backbone: str) -> str:
    if not backbone:
        return "Its fingerprint is not recorded, so any backbone whose sizes fit is taken."
    return f"Fingerprint: `{backbone}`; another backbone is refused."


def _of_weights(fingerprint: str) -> str:
    return f"\n\nFingerprint of the weights: `{fingerprint}`." if fingerprint else ""


_RESIDUAL = "- The match logit contains the first stage's cosine: rank with the embeddings of this very backbone.\n"


def _describe(backbone: BackboneConfig) -> str:
    """The models that encode images and captions."""
    if not (backbone.name or backbone.pretrained):
        return "Which backbone it was trained with is not recorded; set `backbone` in config.yaml."
    library = "transformers" if is_of_transformers(backbone) else "open_clip"
    clip = f"{library} {_named(backbone.name, backbone.pretrained)}"
    if not backbone.token_pretrained:
        return f"{clip}, for patch tokens and embeddings."
    tokens = f"timm {_named(backbone.token_model, backbone.token_pretrained)}"
    return f"{tokens}, for patch tokens, and {clip}, for embeddings."


def _named(name: str, pretrained: str) -> str:
    """Architecture and weights; of a path on this machine, which is nobody else's business, the last part."""
    name, weights = (Path(given).name if Path(given).is_absolute() else given for given in (name, pretrained))
    return f"model `{name}` with weights `{weights}`" if name and weights else f"model `{name or weights}`"
