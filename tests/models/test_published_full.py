"""One line from a name on the Hub to ranked photos: published weights, and the two models that they name.

Every file is fetched from a stand-in of the Hub by the name that the real one has. The weights are random: those of
narrow models in the normal suite, of the published sizes in the slow tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipModel

from models.checkpoints import conversion, published
from models.checkpoints.published import OURS_ALONE, published_name
from models.config import BackboneConfig, BackboneDims, CompressionConfig, EDJEConfig, EncoderConfig
from models.edje import EDJE
from models.language.captions import SPECIAL_TOKENS, CaptionTokenizer
from models.reranker import Reranker
from tests.hub_stand_in import HubStandIn, Repository
from tests.tiny_transformers import VISION, write_siglip

NAME, TOWER, LANGUAGE_MODEL = (
    "shahafw/edje-vl-image-retrieval-reranker",
    "google/siglip2-large-patch16-384",
    "microsoft/MiniLM-L12-H384-uncased",
)
QUERY = "two dogs and a red ball"
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)


@dataclass(frozen=True)
class Sizes:
    """Of the three models; `vision` and `text` in transformers' words."""

    vision: dict[str, int]
    text: dict[str, int]
    dims: BackboneDims
    adapter: CompressionConfig
    encoder: EncoderConfig


NARROW = Sizes(
    vision={},
    text={},
    dims=BackboneDims(num_patches=36, patch_width=32, embedding_width=32),
    adapter=CompressionConfig(num_tokens=4, mlp_width=24, num_heads=VISION["num_attention_heads"]),
    encoder=EncoderConfig(vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32),
)
PUBLISHED = Sizes(
    vision=LARGE | dict(image_size=384, patch_size=16),
    text=LARGE | dict(max_position_embeddings=64),
    dims=BackboneDims(num_patches=576, patch_width=1024, embedding_width=1024),
    adapter=CompressionConfig(),
    encoder=EncoderConfig(vocab_size=30523),
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubStandIn() as hub:
        hub.stand_in(monkeypatch, tmp_path / "home" / "hub")
        yield hub


@pytest.fixture(params=[NARROW, pytest.param(PUBLISHED, marks=pytest.mark.slow)], ids=["narrow", "published"])
def sizes(request, monkeypatch) -> Sizes:
    """The sizes that the names on the Hub stand for: the real ones, or narrow ones in their place."""
    if request.param is NARROW:
        dims, adapter, encoder = NARROW.dims, NARROW.adapter, NARROW.encoder
        tower = published._Tower(TOWER, dims.num_patches, dims.patch_width, adapter.num_heads)
        language_model = published._LanguageModel(
            encoder.hidden_size, encoder.num_heads, encoder.num_layers, encoder.intermediate_size
        )
        monkeypatch.setitem(published.KNOWN_TOWERS, TOWER.split("/")[1], tower)
        monkeypatch.setitem(published.KNOWN_LANGUAGE_MODELS, LANGUAGE_MODEL.split("/")[1].lower(), language_model)
    return request.param


def publish(hub: HubStandIn, name: str, files: dict[str, bytes]) -> None:
    hub.repositories[name] = Repository()
    hub.repositories[name].commit("main", files)


def publish_language_model(hub: HubStandIn, words: int, folder: Path) -> CaptionTokenizer:
    """A repository with BERT's vocabulary file, as the real one has it; returns its tokenizer."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), "dogs", "ball", "red"]
    pieces += [f"word{number}" for number in range(words - len(pieces))]
    (folder / "vocab.txt").write_text("\n".join(pieces[:words]) + "\n")
    vocabulary = (folder / "vocab.txt").read_bytes()
    publish(hub, LANGUAGE_MODEL, {"vocab.txt": vocabulary, "config.json": b'{"model_type": "bert"}'})
    return CaptionTokenizer.from_pretrained(folder / "vocab.txt")


def publish_tower(hub: HubStandIn, sizes: Sizes, folder: Path) -> None:
    write_siglip(folder, text=sizes.text, **sizes.vision)
    publish(hub, TOWER, {file.name: file.read_bytes() for file in folder.iterdir()})


def publish_weights(hub: HubStandIn, model: EDJE, file: Path, beside: dict[str, Any]) -> None:
    """In the published layout, with a tensor of each frozen tower, as the published code's training saves it."""
    state = {published_name(name): value for name, value in model.state_dict().items() if name not in OURS_ALONE}
    towers = {f"{prefix}.vision_model.weight": torch.ones(2) for prefix in ("clip", "vision_encoder")}
    if file.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in (state | towers).items()}, file)
    else:
        torch.save({"model": {f"module.{name}": value for name, value in (state | towers).items()}, **beside}, file)
    publish(hub, NAME, {file.name: file.read_bytes(), ".gitattributes": b"", "README.md": b"# EDJE"})


def photos(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        noise = torch.randint(0, 256, (40 + 7 * number, 60, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((180, 120)).save(path)
    return paths


@torch.no_grad()
def published_logits(model: EDJE, tower: SiglipModel, reranker: Reranker, paths: list[Path]) -> torch.Tensor:
    """By transformers' own call of the tower, and the model as it was before it was published."""
    pixels = torch.stack([reranker.backbone.preprocess(Image.open(path)) for path in paths])
    tokens = model.compress(tower.vision_model(pixel_values=pixels).last_hidden_state)
    return model.score([QUERY] * len(paths), tokens)


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint_16.pth"])
def test_one_line_fetches_the_published_weights_and_what_they_name_and_ranks_photos(
    hub, sizes, file, tmp_path, monkeypatch
):
    tokenizer = publish_language_model(hub, sizes.encoder.vocab_size - 1, tmp_path)
    publish_tower(hub, sizes, tmp_path / "tower")
    torch.manual_seed(0)
    config = EDJEConfig(backbone=BackboneConfig(), dims=sizes.dims, adapter=sizes.adapter, encoder=sizes.encoder)
    model = EDJE(config, tokenizer).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so wide that images differ in their logits
            torch.nn.init.normal_(parameter, std=1.2 * parameter.shape[-1] ** -0.5)
    names = {"siglip_path": TOWER, "language_model_path": LANGUAGE_MODEL}
    publish_weights(hub, model, tmp_path / file, {"config": names, "epoch": 16})

    reranker = Reranker.from_pretrained(NAME, device="cpu", dtype="float32")
    named = reranker.model.config
    assert (named.backbone.name, named.backbone.pretrained) == (TOWER, "")
    assert (named.dims, named.adapter, named.encoder) == (config.dims, config.adapter, config.encoder)
    paths = photos(tmp_path / "photos")
    hits = reranker.rank(QUERY, paths, score="match")
    scores = torch.tensor([hit["score"] for hit in sorted(hits, key=lambda hit: hit["corpus_id"])])
    tower = SiglipModel.from_pretrained(tmp_path / "tower").eval()
    expected = published_logits(model, tower, reranker, paths)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(conversion, "convert", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Reranker.from_pretrained(NAME, device="cpu", dtype="float32").rank(QUERY, paths, score="match") == hits
