"""One pass gives tokens and embedding, for every kind of tower; weights that do not fit are refused by name."""

import json
import pickle
import shutil

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer
from torchvision.transforms.functional import pil_to_tensor
from transformers import BertConfig

from models.config import BackboneConfig, BackboneDims, LocalConfig
from models.errors import UserError
from models.reranker import Reranker
from models.vision import backbones
from models.vision.backbones import Backbone, Family, ImageFeatures
from models.vision.open_clip_backbone import CONFIG_FILE, WEIGHTS_FILE, load_directory
from tests.tiny_model import make_model, write_images

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
ATTENTION_POOLED = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
CLASS_TOKEN = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
CNN = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 64}
TEXT = {"context_length": 12, "vocab_size": 30, "width": 32, "heads": 2, "layers": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red blue ball box left of".split()]
CAPTIONS = ["a red ball", "blue box left of a red ball", "ball"]
CNN_TOKENS = {"token_stages": (2, 3), "token_grid": 6}
"""Maps of 8x8x32 and 4x4x48; 16 channels of position."""


def write_directory(directory, vision, text=None, seed=0, **model):
    """An open_clip model directory with random weights, as scripts/train_embedder.py leaves one."""
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    BertWordPieceTokenizer(str(directory / "vocab.txt")).save(str(directory / "tokenizer.json"))
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    text = text or TEXT | {"pool_type": "eos", "eos_id": 3}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text | {"hf_tokenizer_name": "."}, **model}
    look = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (directory / CONFIG_FILE).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": look}))
    torch.manual_seed(seed)
    save_file(load_directory(directory, load_weights=False).state_dict(), directory / WEIGHTS_FILE)
    return directory


def load(directory, **tokens):
    return Backbone.load(BackboneConfig(pretrained=str(directory), **tokens), precision="float32")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("models") / "vit", VIT)


@pytest.mark.parametrize(
    ("vision", "tokens", "shape"),
    [
        (VIT, {}, (16, 32)),
        (ATTENTION_POOLED, {}, (100, 96)),
        (CLASS_TOKEN, {}, (100, 64)),
        (CNN, CNN_TOKENS, (36, 96)),
    ],
    ids=["vit", "timm-attention-pooled", "timm-class-token", "cnn"],
)
def test_one_pass_gives_tokens_and_the_embedding_of_encode_image(tmp_path, vision, tokens, shape):
    backbone = load(write_directory(tmp_path / "model", vision, custom_text="timm_model_name" in vision), **tokens)
    passes = []
    backbone.clip.visual.register_forward_hook(lambda *_: passes.append("second pass"))
    pixels = torch.randn(3, 3, vision["image_size"], vision["image_size"])
    features = backbone.encode_images(pixels)
    assert not passes
    torch.testing.assert_close(features.embedding, F.normalize(backbone.clip.encode_image(pixels), dim=-1))
    assert features.patch_tokens.shape[1:] == shape == (backbone.dims.num_patches, backbone.dims.patch_width)
    assert features.embedding.shape == (3, backbone.dims.embedding_width)


def test_tokens_of_a_convolutional_tower_say_where_they_stand(tmp_path):
    backbone = load(write_directory(tmp_path / "model", CNN, custom_text=True), **CNN_TOKENS)
    places = backbone.encode_images(torch.randn(2, 3, 64, 64)).patch_tokens[..., -16:]
    assert torch.equal(places[0], places[1])
    rows, columns = places[0].view(6, 6, 2, 8).unbind(2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    assert len({tuple(place.tolist()) for place in places[0]}) == 36


def test_vit_tokens_are_the_last_layer_after_the_final_norm_without_class_token(vit):
    backbone, pixels = load(vit), torch.randn(2, 3, 32, 32)
    visual = backbone.clip.visual
    hidden = visual.ln_post(visual.transformer(visual._embeds(pixels)))
    torch.testing.assert_close(backbone.encode_images(pixels).patch_tokens, hidden[:, 1:])


def test_timm_tokens_are_the_normalised_features_of_the_trunk(tmp_path):
    backbone = load(write_directory(tmp_path / "model", ATTENTION_POOLED, custom_text=True))
    pixels = torch.randn(2, 3, 160, 160)
    expected = backbone.clip.visual.trunk.forward_features(pixels)[:, -100:]
    torch.testing.assert_close(backbone.encode_images(pixels).patch_tokens, expected)


def test_cnn_tokens_keep_the_place_of_what_they_show(tmp_path):
    backbone = load(write_directory(tmp_path / "model", CNN, custom_text=True), **CNN_TOKENS)
    blank, marked = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    marked[:, :, :8, 56:] = 3.0  # top right
    change = (backbone.encode_images(marked).patch_tokens - backbone.encode_images(blank).patch_tokens).norm(dim=-1)
    row, column = divmod(int(change[0].argmax()), 6)
    assert row <= 1 and column >= 4


def test_embeddings_are_unit_length_and_text_agrees_with_open_clip(vit):
    backbone = load(vit)
    texts = backbone.encode_texts(CAPTIONS)
    expected = backbone.clip.encode_text(backbone.tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(texts, expected)
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(3))
    assert backbone.encode_texts([]).shape == (0, 24)


def test_a_caption_embeds_the_same_whatever_batch_it_is_in(vit):
    backbone = load(vit)
    many = backbone.encode_texts(CAPTIONS * 100)
    torch.testing.assert_close(many[200], backbone.encode_texts(CAPTIONS[2:])[0])


def test_backbone_is_frozen_and_stays_in_eval_mode(vit):
    backbone = load(vit)
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_tokens_can_feed_a_layer_that_trains(vit):
    backbone = load(vit)
    layer = torch.nn.Linear(32, 1)
    layer(backbone.encode_images(torch.randn(1, 3, 32, 32)).patch_tokens).sum().backward()
    assert layer.weight.grad is not None


def test_bfloat16_stays_close_to_float32(vit):
    pixels = torch.randn(4, 3, 32, 32)
    exact = load(vit).encode_images(pixels)
    fast = Backbone.load(BackboneConfig(pretrained=str(vit)), precision="bfloat16").encode_images(pixels)
    assert fast.embedding.dtype == fast.patch_tokens.dtype == torch.float32
    assert (exact.embedding * fast.embedding).sum(-1).min() > 0.999


def test_float32_holds_inside_a_callers_autocast(vit):
    backbone, pixels = load(vit), torch.randn(2, 3, 32, 32)
    expected = backbone.encode_images(pixels).patch_tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone.encode_images(pixels).patch_tokens, expected)


def test_preprocess_is_deterministic_and_survives_pickling(vit):
    preprocess = load(vit).preprocess
    image = Image.effect_noise((50, 37), 80).convert("RGB")
    pixels = preprocess(image)
    assert pixels.shape == (3, 32, 32)
    assert torch.equal(pixels, pickle.loads(pickle.dumps(preprocess))(image))


def test_fingerprint_ignores_the_place_and_sees_weights_preprocessing_and_tokens(tmp_path):
    first = write_directory(tmp_path / "first", CNN, custom_text=True)
    shutil.copytree(first, tmp_path / "copy")
    shutil.copytree(first, tmp_path / "look")
    config = json.loads((first / CONFIG_FILE).read_text())
    config["preprocess_cfg"]["mean"] = [0.4] * 3
    (tmp_path / "look" / CONFIG_FILE).write_text(json.dumps(config))
    other = write_directory(tmp_path / "other", CNN, seed=1, custom_text=True)
    fingerprint = load(first, **CNN_TOKENS).fingerprint
    assert load(tmp_path / "copy", **CNN_TOKENS).fingerprint == fingerprint
    assert load(tmp_path / "look", **CNN_TOKENS).fingerprint != fingerprint
    assert load(other, **CNN_TOKENS).fingerprint != fingerprint
    assert load(first, token_stages=(2, 3), token_grid=5).fingerprint != fingerprint


def test_hugging_face_text_tower_is_built_from_the_directory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(WORDS), **size).save_pretrained(tmp_path / "text")
    text = {"hf_model_name": str(tmp_path / "text"), "hf_model_pretrained": False, "context_length": 12}
    directory = write_directory(tmp_path / "model", CNN, text=text | {"hf_proj_type": "mlp"})
    (tmp_path / "text").rename(directory / "text")
    config = json.loads((directory / CONFIG_FILE).read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_model_name": "text"}
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    backbone = load(directory, **CNN_TOKENS)
    assert backbone.encode_texts(CAPTIONS).shape == (3, 24)
    saved = load_file(directory / WEIGHTS_FILE)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in backbone.clip.state_dict().items())


@pytest.mark.parametrize("tag", ["openai", "dfn2b", "metaclip_fullcc"])
def test_quick_gelu_weights_on_another_activation_are_refused(tag):
    with pytest.raises(UserError, match="set backbone.name to ViT-L-14-quickgelu"):
        Backbone.load(BackboneConfig(name="ViT-L-14", pretrained=tag))


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-L-14-quickgelu", "openai"),
        ("ViT-L-14-336-quickgelu", "openai"),
        ("ViT-L-14-quickgelu", "dfn2b"),
        ("ViT-L-14-quickgelu", "metaclip_fullcc"),
        ("ViT-B-16-SigLIP2-384", "webli"),
        ("ViT-L-16-SigLIP2-384", "webli"),
    ],
)
def test_the_backbones_of_the_paper_pass_every_check_before_the_download(name, tag, monkeypatch):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(UserError, match=f"{name}: weights '{tag}' cannot be loaded .*unreachable.*backbone.pretrained"):
        Backbone.load(BackboneConfig(name=name, pretrained=tag))


def unreachable(*_, **__):
    raise OSError("hub unreachable")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "ViT-Q"}, "'ViT-Q' is not an open_clip architecture"),
        ({"pretrained": "no/such/folder"}, "'no/such/folder' is not a directory"),
        ({"name": "ViT-B-32", "pretrained": "nowhere.pt"}, "'nowhere.pt', which is neither a file.*openai"),
        ({"name": "ViT-B-32"}, "is neither a file.*or 'random'"),
    ],
)
def test_unknown_architecture_or_weights_are_named(config, message):
    with pytest.raises(UserError, match=message):
        Backbone.load(BackboneConfig(**config))


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json"])
def test_a_file_missing_from_the_directory_is_named(vit, tmp_path, missing):
    shutil.copytree(vit, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    (tmp_path / "model" / "vocab.txt").unlink()
    with pytest.raises(UserError, match=f"{missing} is missing|tokenizer cannot be loaded"):
        load(tmp_path / "model")


def test_truncated_weights_are_named(vit, tmp_path):
    shutil.copytree(vit, tmp_path / "model")
    content = (vit / WEIGHTS_FILE).read_bytes()
    (tmp_path / "model" / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model: cannot be loaded as an open_clip model"):
        load(tmp_path / "model")


def test_weights_of_another_architecture_are_refused(vit, tmp_path):
    wider = write_directory(tmp_path / "wider", VIT | {"width": 48})
    shutil.copyfile(vit / WEIGHTS_FILE, wider / WEIGHTS_FILE)
    with pytest.raises(UserError, match="wider: cannot be loaded"):
        load(wider)


def test_name_and_directory_together_are_refused(vit):
    with pytest.raises(UserError, match="leave backbone.name empty"):
        Backbone.load(BackboneConfig(name="ViT-B-32", pretrained=str(vit)))


def test_cnn_without_stages_and_vit_with_stages_are_refused(vit, tmp_path):
    cnn = write_directory(tmp_path / "cnn", CNN, custom_text=True)
    with pytest.raises(UserError, match="needs token_stages and token_grid"):
        load(cnn)
    with pytest.raises(UserError, match="not a timm model"):
        load(vit, **CNN_TOKENS)
    with pytest.raises(UserError, match="token_stages \\[9\\]"):
        load(cnn, token_stages=(9,), token_grid=4)


def test_random_weights_are_named_in_the_fingerprint(vit):
    config = json.loads((vit / CONFIG_FILE).read_text())["model_cfg"]
    open_clip.factory._MODEL_CONFIGS["tiny-for-test"] = config
    torch.manual_seed(0)
    backbone = Backbone.load(BackboneConfig(name="tiny-for-test", pretrained="random"), precision="float32")
    assert backbone.fingerprint.startswith("tiny-for-test/random-")


def test_a_weight_file_loads_under_its_architecture_name(vit, tmp_path):
    config = json.loads((vit / CONFIG_FILE).read_text())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name")
    open_clip.factory._MODEL_CONFIGS["tiny-for-test"] = config
    from_file = BackboneConfig(name="tiny-for-test", pretrained=str(vit / WEIGHTS_FILE))
    loaded = Backbone.load(from_file, precision="float32").clip.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(vit / WEIGHTS_FILE).items())
    (tmp_path / "cut.safetensors").write_bytes((vit / WEIGHTS_FILE).read_bytes()[:1000])
    with pytest.raises(UserError, match="cut.safetensors: cannot be loaded as weights of tiny-for-test"):
        Backbone.load(BackboneConfig(name="tiny-for-test", pretrained=str(tmp_path / "cut.safetensors")))


class MeanColours(Backbone):
    """A family of one model: an image's mean colour as its only patch token, and as its embedding."""

    @classmethod
    def build(cls, config, device, dtype):
        backbone = cls()
        backbone.config, backbone.fingerprint, backbone.preprocess = (
            config,
            "colours",
            lambda image: pil_to_tensor(image.resize((8, 8))) / 255,
        )
        backbone.dims = BackboneDims(num_patches=1, patch_width=3, embedding_width=3)
        return backbone

    @property
    def device(self):
        return torch.device("cpu")

    def encode_images(self, pixels):
        means = pixels.mean((2, 3))
        return ImageFeatures(means[:, None], torch.nn.functional.normalize(means, dim=-1))

    def encode_texts(self, captions):
        return torch.nn.functional.normalize(torch.tensor([[float("red" in c), 0.1, 0.0] for c in captions]), dim=-1)


def test_another_family_is_a_class_and_a_line(monkeypatch, tmp_path):
    """It is loaded by its configuration, and indexes and reranks as any other."""
    family = Family("test", "MeanColours", serves=lambda config: config.name == "colours")
    monkeypatch.setattr(Family, "backbone", lambda self: MeanColours if self is family else pytest.fail("open_clip"))
    monkeypatch.setattr(backbones, "FAMILIES", (family, *backbones.FAMILIES))
    backbone = Backbone.load(BackboneConfig(name="colours"))
    names = write_images(tmp_path / "images", 3)
    model = make_model(backbone, tmp_path / "vocab.txt", adapter=LocalConfig(mlp_width=8))
    reranker = Reranker(model, backbone, torch.float32)
    store = reranker.index(tmp_path / "images", tmp_path / "store", progress=False)
    assert store.manifest.backbone == "colours" and store.gather(names).shape == (3, 1, 16)
    assert len(reranker.rank("a red ball", store.ids)) == 3
