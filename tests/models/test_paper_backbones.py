"""The paper's seven backbones against open_clip's own passes and against `transformers` on the same weights.

Values need the real sizes' memory and minutes: those tests are marked slow (`bash scripts/test.sh -m slow`)."""

from functools import partial

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from models.config import BackboneConfig, BackboneDims
from models.state_dicts import load_state
from models.vision.backbones import Backbone
from models.vision.open_clip_backbone import OpenClipBackbone
from tests.processes import ROOT
from training.config import load_config

CONFIGS = {
    "clip_b16": (196, 768, 512),
    "clip_l14": (256, 1024, 768),
    "clip_l14_336": (576, 1024, 768),
    "dfn_l14": (256, 1024, 768),
    "metaclip_l14": (256, 1024, 768),
    "siglip2_b16": (576, 768, 768),
    "siglip2_l16": (576, 1024, 1024),
}
"""configs/pretrain_NAME.yaml: patch tokens, their width, width of the embedding."""
TINY_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 30, "width": 32, "heads": 2, "layers": 1},
}
TINY_SIGLIP = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 48,
        "timm_model_name": "vit_base_patch16_siglip_384",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": TINY_CLIP["text_cfg"],
}
"""timm's own entry for SigLIP 2 (activation, pooling, no class token); the test makes it narrow and shallow."""

SIGLIP_ACTIVATIONS = [("gelu", 1e-4), ("gelu_pytorch_tanh", 3e-3)]
"""timm's base and large towers compute the exact GELU, `transformers` its tanh approximation (off by 5e-4 at most)."""


def random_backbone(name: str) -> Backbone:
    """A real architecture with random weights; biases and norms too, so that one left out would show."""
    torch.manual_seed(0)
    backbone = Backbone.load(BackboneConfig(name=name, pretrained="random"), precision="float32")
    with torch.no_grad():
        for parameter in backbone.clip.visual.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def random_pixels(backbone: Backbone) -> Tensor:
    size = open_clip.utils.to_2tuple(backbone.clip.visual.image_size)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS)
def test_each_config_names_an_architecture_whose_tokens_its_adapter_takes(config):
    """A pass through the real architecture, on the meta device: shapes without weights."""
    run = load_config(ROOT / "configs" / f"pretrain_{config}.yaml")
    with torch.device("meta"):
        clip = open_clip.create_model(run.backbone.name, device="meta")
    patches, width, embedding = CONFIGS[config]
    expected = BackboneDims(num_patches=patches, patch_width=width, embedding_width=embedding)
    assert OpenClipBackbone(run.backbone, clip, torch.float32, weights="none").dims == expected
    assert width % run.model.adapter.num_heads == 0


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_one_pass_gives_the_tokens_and_the_embedding_that_open_clip_gives_itself(config):
    backbone = random_backbone(load_config(ROOT / "configs" / f"pretrain_{config}.yaml").backbone.name)
    pixels, visual = random_pixels(backbone), backbone.clip.visual
    features = backbone.encode_images(pixels)
    assert features.patch_tokens.shape[1:] == CONFIGS[config][:2]
    torch.testing.assert_close(features.embedding, backbone.clip.encode_image(pixels, normalize=True))
    if config.startswith("siglip2"):
        tokens = visual.trunk.forward_features(pixels)
    else:
        visual.output_tokens = True
        _, tokens = visual(pixels)
    torch.testing.assert_close(features.patch_tokens, tokens)


def split_qkv(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return dict(zip((f"{name.format(part)}" for part in ("q_proj", "k_proj", "v_proj")), tensor.chunk(3), strict=True))


def renamed(state: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    for name, other in pairs:
        state = {key.replace(name, other): tensor for key, tensor in state.items()}
    return state


def clip_tower(visual: nn.Module) -> CLIPVisionModel:
    """open_clip's image tower as `transformers` has it, with its weights."""
    first = visual.transformer.resblocks[0]
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=visual.conv1.out_channels,
            intermediate_size=first.mlp.c_fc.out_features,
            num_hidden_layers=len(visual.transformer.resblocks),
            num_attention_heads=first.attn.num_heads,
            image_size=visual.image_size[0],
            patch_size=visual.patch_size[0],
            hidden_act="quick_gelu",
        )
    )
    state = visual.state_dict()
    del state["proj"]
    for name in [name for name in state if ".in_proj_" in name]:
        state |= split_qkv(name.replace("attn.in_proj_", "self_attn.{}."), state.pop(name))
    state["embeddings.position_embedding.weight"] = state.pop("positional_embedding")
    names = [
        ("transformer.resblocks.", "encoder.layers."), (".attn.", ".self_attn."), (".ln_", ".layer_norm"),
        ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"),
        ("conv1", "embeddings.patch_embedding"), ("class_embedding", "embeddings.class_embedding"),
    ]  # fmt: skip
    return loaded(tower, renamed(state, names))


def siglip_tower(trunk: nn.Module, hidden_act: str) -> SiglipVisionModel:
    """timm's image tower as `transformers` has it, with its weights."""
    first = trunk.blocks[0]
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=trunk.embed_dim,
            intermediate_size=first.mlp.fc1.out_features,
            num_hidden_layers=len(trunk.blocks),
            num_attention_heads=first.attn.num_heads,
            image_size=trunk.patch_embed.img_size[0],
            patch_size=trunk.patch_embed.patch_size[0],
            hidden_act=hidden_act,
        )
    )
    state = trunk.state_dict()
    for kind in ("weight", "bias"):
        pair = [state.pop(f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        state[f"head.attention.in_proj_{kind}"] = torch.cat(pair)
    for name in [name for name in state if ".qkv." in name]:
        state |= split_qkv(name.replace("attn.qkv.", "self_attn.{}."), state.pop(name))
    state["embeddings.position_embedding.weight"] = state.pop("pos_embed")[0]
    names = [
        ("attn_pool.latent", "head.probe"), ("attn_pool.proj", "head.attention.out_proj"),
        ("attn_pool.norm", "head.layernorm"), ("attn_pool.", "head."), ("attn.proj", "self_attn.out_proj"),
        ("blocks.", "encoder.layers."), (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
    ]  # fmt: skip
    state = renamed(state, names)
    state |= {f"post_layernorm.{kind}": state.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    return loaded(tower, state)


def loaded(tower: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Strictly; the versions of `transformers` differ in whether the names begin with `vision_model.`."""
    names = {name.removeprefix("vision_model."): name for name, _ in tower.named_parameters()}
    load_state(tower, {names.get(name, name): tensor for name, tensor in state.items()})
    return tower.eval()


@torch.no_grad()
def check_clip(backbone: Backbone) -> None:
    pixels, tower = random_pixels(backbone), clip_tower(backbone.clip.visual)
    features, theirs = backbone.encode_images(pixels), tower(pixels)
    post_layernorm = tower.get_submodule(
        next(name for name, _ in tower.named_modules() if name.endswith("post_layernorm"))
    )
    tokens = post_layernorm(theirs.last_hidden_state)[:, 1:]
    torch.testing.assert_close(features.patch_tokens, tokens, rtol=1e-4, atol=1e-4)
    embedding = F.normalize(theirs.pooler_output @ backbone.clip.visual.proj, dim=-1)
    torch.testing.assert_close(features.embedding, embedding, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def check_siglip(backbone: Backbone, hidden_act: str, atol: float) -> None:
    pixels, tower = random_pixels(backbone), siglip_tower(backbone.clip.visual.trunk, hidden_act)
    features, theirs = backbone.encode_images(pixels), tower(pixels)
    torch.testing.assert_close(features.patch_tokens, theirs.last_hidden_state, rtol=0, atol=atol)
    torch.testing.assert_close(features.embedding, F.normalize(theirs.pooler_output, dim=-1), rtol=0, atol=atol)


@pytest.fixture
def tiny(monkeypatch):
    """Makes an architecture of the given configuration known to open_clip; a timm tower 32 wide and two blocks deep."""
    narrow = partial(timm.create_model, img_size=48, embed_dim=32, depth=2, num_heads=2)
    monkeypatch.setattr(open_clip.timm_model.timm, "create_model", narrow)

    def build(config: dict) -> Backbone:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-for-test", config)
        backbone = random_backbone("tiny-for-test")
        # Wide enough apart that GELU's tanh approximation shows too.
        for parameter in backbone.clip.visual.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return backbone

    return build


def test_clip_tokens_are_those_of_transformers_after_its_final_norm_without_class_token(tiny):
    check_clip(tiny(TINY_CLIP))


@pytest.mark.parametrize(("hidden_act", "atol"), SIGLIP_ACTIVATIONS)
def test_siglip_tokens_are_the_last_hidden_state_of_transformers(tiny, hidden_act, atol):
    check_siglip(tiny(TINY_SIGLIP), hidden_act, atol)


@pytest.mark.slow
def test_clip_of_real_size_agrees_with_transformers():
    check_clip(random_backbone("ViT-B-16-quickgelu"))


@pytest.mark.slow
@pytest.mark.parametrize(("hidden_act", "atol"), SIGLIP_ACTIVATIONS)
def test_siglip_2_of_real_size_agrees_with_transformers(hidden_act, atol):
    check_siglip(random_backbone("ViT-B-16-SigLIP2-384"), hidden_act, atol)
