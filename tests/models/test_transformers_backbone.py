"""CLIP and SigLIP of `transformers`: pixels, tokens and embeddings are the model's own, from a directory or the Hub."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Siglip2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

import train
from evaluation import evaluate_retrieval
from models.checkpoints.hub import upload_checkpoint
from models.checkpoints.model_card import model_card
from models.config import BackboneConfig, BackboneDims
from models.edje import EDJE
from models.errors import UserError
from models.reranker import Reranker
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone
from models.vision.images import open_image
from models.vision.transformers_backbone import TransformersBackbone
from scripts import precompute_tokens
from scripts.export_checkpoint import export_checkpoint
from tests.hub_stand_in import HubStandIn, Repository
from tests.tiny_model import make_model, write_backbone, write_images
from tests.tiny_transformers import CONTEXT, SIDE, write_clip, write_siglip

KINDS = {"clip": (CLIPModel, write_clip, 20), "siglip": (SiglipModel, write_siglip, 32)}
CAPTIONS = ["a red ball", "A Blue box Left of a red ball with a long tail of words", "ball"]


def load(directory, **keys):
    return Backbone.load(BackboneConfig(pretrained=str(directory), **keys), precision="float32")


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write(root / kind) for kind, (_, write, _) in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def directory(directories, kind) -> Path:
    return directories[kind]


@pytest.fixture
def copy(directory, tmp_path) -> Path:
    """A directory of one's own to damage."""
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def edit(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def pixels(count=3):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_images(backbone, model, pixels):
    """Tokens after the final norm without class token, and the embedding, against the model's own calls."""
    features, theirs = backbone.encode_images(pixels), model.vision_model(pixels)
    assert features.patch_tokens.shape[1:] == (backbone.dims.num_patches, backbone.dims.patch_width)
    tokens = theirs.last_hidden_state
    if isinstance(model, CLIPModel):
        norm = model.vision_model.post_layernorm
        tokens = F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)[:, 1:]
    torch.testing.assert_close(features.patch_tokens, tokens, rtol=1e-5, atol=1e-5)
    embedding = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(features.embedding, embedding, rtol=0, atol=1e-5)


def test_tokens_and_embedding_are_the_models_own_in_one_forward(directory, kind):
    backbone, model = load(directory), KINDS[kind][0].from_pretrained(directory)
    passes = []
    backbone.model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    features = backbone.encode_images(pixels())
    assert len(passes) == 1
    assert backbone.dims == BackboneDims(num_patches=36, patch_width=32, embedding_width=KINDS[kind][2])
    assert features.patch_tokens.shape == (3, 36, 32) and features.embedding.shape == (3, KINDS[kind][2])
    assert features.patch_tokens.dtype == features.embedding.dtype == torch.float32
    check_images(backbone, model, pixels())


@torch.no_grad()
def test_texts_are_tokenised_as_the_model_was_trained_and_cut_at_its_context(directory, kind):
    backbone, model = load(directory), KINDS[kind][0].from_pretrained(directory)
    tokens = AutoTokenizer.from_pretrained(directory)(
        [caption.lower() for caption in CAPTIONS],
        padding="max_length",
        max_length=CONTEXT,
        truncation=True,
        return_tensors="pt",
    )
    assert tokens["input_ids"].shape == (3, CONTEXT)
    expected = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(backbone.encode_texts(CAPTIONS), expected, rtol=0, atol=1e-5)
    assert backbone.encode_texts([]).shape == (0, KINDS[kind][2])


def test_padding_of_siglip_is_not_masked_even_where_the_tokenizer_would(directories, tmp_path):
    masking = Path(shutil.copytree(directories["siglip"], tmp_path / "masking"))
    edit(masking / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    assert "attention_mask" in AutoTokenizer.from_pretrained(masking)(CAPTIONS)
    assert torch.equal(load(masking).encode_texts(CAPTIONS), load(directories["siglip"]).encode_texts(CAPTIONS))


def test_an_image_and_a_caption_embed_the_same_whatever_batch_they_are_in(directory):
    backbone, many = load(directory), pixels(9)
    alone, together = backbone.encode_images(many[4:5]), backbone.encode_images(many)
    torch.testing.assert_close(alone.patch_tokens[0], together.patch_tokens[4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.embedding[0], together.embedding[4], rtol=0, atol=1e-5)
    texts = backbone.encode_texts(CAPTIONS * 100)
    torch.testing.assert_close(texts[299], backbone.encode_texts(CAPTIONS[2:])[0], rtol=0, atol=1e-5)


def image_files(folder: Path) -> dict[str, Path]:
    """One picture of 70 x 50 in each form; the last lies on its side by its EXIF."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {name: folder / name for name in ("rgb.png", "grey.png", "palette.png", "opaque.png", "turned.jpg")}
    rgb.save(files["rgb.png"])
    rgb.convert("L").save(files["grey.png"])
    rgb.quantize(17).save(files["palette.png"])
    rgb.convert("RGBA").save(files["opaque.png"])
    rgb.save(files["turned.jpg"], exif=exif)
    return files


def test_pixels_are_the_image_processors_for_every_form_of_image(directory, tmp_path):
    processor, preprocess = AutoImageProcessor.from_pretrained(directory), load(directory).preprocess
    for file in image_files(tmp_path).values():
        upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        expected = processor(images=upright, return_tensors="pt")["pixel_values"][0]
        assert expected.shape == (3, SIDE, SIDE)
        assert torch.equal(preprocess(open_image(file)), expected), file.name
        assert torch.equal(preprocess(ImageOps.exif_transpose(Image.open(file))), expected), file.name


def test_pixels_are_within_two_steps_of_pillows_resize(directory, tmp_path):
    """Of 255: the slow processors of transformers 4, which other users' numbers may come from."""
    image = open_image(image_files(tmp_path)["rgb.png"])
    slow = AutoImageProcessor.from_pretrained(directory, backend="pil")(images=image, return_tensors="pt")
    ours, std = load(directory).preprocess(image), min(AutoImageProcessor.from_pretrained(directory).image_std)
    assert (ours - slow["pixel_values"][0]).abs().max() < 2.01 / 255 / std


def test_preprocess_survives_pickling(directory):
    preprocess = load(directory).preprocess
    image = Image.effect_noise((50, 37), 80).convert("RGB")
    assert torch.equal(preprocess(image), pickle.loads(pickle.dumps(preprocess))(image))


def test_backbone_is_frozen_stays_in_eval_mode_and_feeds_a_layer_that_trains(directory):
    backbone = load(directory).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    layer = torch.nn.Linear(32, 1)
    layer(backbone.encode_images(pixels()).patch_tokens).sum().backward()
    assert layer.weight.grad is not None


def test_bfloat16_stays_close_and_float32_holds_inside_a_callers_autocast(directory):
    exact = load(directory)
    fast = Backbone.load(BackboneConfig(pretrained=str(directory)), precision="bfloat16")
    features, rounded = exact.encode_images(pixels()), fast.encode_images(pixels())
    assert rounded.patch_tokens.dtype == rounded.embedding.dtype == torch.float32
    assert not torch.equal(features.embedding, rounded.embedding)
    assert (features.embedding * rounded.embedding).sum(-1).min() > 0.995
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact.encode_images(pixels()).patch_tokens, features.patch_tokens)


def test_captions_may_be_embedded_by_eight_threads_at_once(directory):
    backbone = load(directory)
    expected = backbone.encode_texts(CAPTIONS)
    with ThreadPoolExecutor(8) as threads:
        for texts in threads.map(lambda _: backbone.encode_texts(CAPTIONS), range(32)):
            torch.testing.assert_close(texts, expected)


def test_fingerprint_ignores_place_and_name_and_sees_all_that_changes_outputs(directory, kind, tmp_path):
    fingerprint = load(directory).fingerprint
    copies = {name: Path(shutil.copytree(directory, tmp_path / name)) for name in ("same", "pixels", "activation")}
    edit(copies["pixels"] / "preprocessor_config.json", resample=0)
    config = json.loads((directory / "config.json").read_text())
    edit(copies["activation"] / "config.json", vision_config=config["vision_config"] | {"hidden_act": "relu"})
    assert load(copies["same"]).fingerprint == fingerprint
    named = Backbone.load(BackboneConfig(name=str(copies["same"])), precision="float32")
    assert named.fingerprint == fingerprint and fingerprint.startswith(f"transformers-{kind}/")
    weights = load(KINDS[kind][1](tmp_path / "weights", seed=1)).fingerprint
    others = {weights, load(copies["pixels"]).fingerprint, load(copies["activation"]).fingerprint}
    assert len(others | {fingerprint}) == 4


def test_random_weights_need_the_configuration_alone_and_are_named_in_the_fingerprint(directory, copy):
    (copy / "model.safetensors").unlink()
    random = Backbone.load(BackboneConfig(name=str(copy), pretrained="random"), precision="float32")
    assert "/random-" in random.fingerprint and random.dims == load(directory).dims


def test_a_folder_that_is_both_libraries_is_open_clips_as_pretrained(directory, tmp_path):
    both = tmp_path / "both"
    write_backbone(both)
    shutil.copytree(directory, both, dirs_exist_ok=True)
    assert load(both).fingerprint.startswith("open_clip/")
    assert isinstance(Backbone.load(BackboneConfig(name=str(both)), precision="float32"), TransformersBackbone)


# --- what is refused, in one line ---


def refused(config: BackboneConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Backbone.load(config, precision="float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Siglip2Config(), "a NaFlex SigLIP 2, whose number of patches varies"),
        (BertConfig(), "model_type 'bert'; served are clip and siglip"),
        (CLIPVisionConfig(), "model_type 'clip_vision_model'.*image and text tower"),
        (SiglipConfig(vision_config={"vision_use_head": False}), "no pooling head"),
    ],
    ids=["naflex", "bert", "one-tower", "no-head"],
)
def test_other_models_are_refused_by_their_type(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    refused(BackboneConfig(pretrained=str(tmp_path)), message)


def test_weights_that_the_files_lack_are_named_not_left_at_random(copy):
    state = load_file(copy / "model.safetensors")
    left_out = next(name for name in state if "post_layernorm.weight" in name)
    save_file({name: tensor for name, tensor in state.items() if name != left_out}, copy / "model.safetensors")
    refused(BackboneConfig(pretrained=str(copy)), f"lack 1 weights of .*{left_out}; download the whole model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "weights cannot be loaded"),
        ("preprocessor_config.json", "image processor cannot be loaded"),
        ("tokenizer.json", "tokenizer cannot be loaded"),
        ("config.json", "config.json cannot be loaded"),
    ],
)
def test_a_damaged_file_is_named(copy, name, message):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    refused(BackboneConfig(pretrained=str(copy)), f"copy: {message} .*restore the directory's files")


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_an_error(copy, name):
    (copy / name).unlink()
    refused(
        BackboneConfig(pretrained=str(copy)), "copy: (.* cannot be loaded .*restore the|its tokenizer has .*restore)"
    )


def test_a_package_that_a_tokenizer_needs_is_asked_for(directory, monkeypatch):
    def from_pretrained(source):
        raise ImportError("SiglipTokenizer requires the SentencePiece library\nbut it was not found")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    refused(BackboneConfig(pretrained=str(directory)), "requires the SentencePiece library.*; install the package")


def test_weights_of_another_size_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", vision_config=config["vision_config"] | {"intermediate_size": 64})
    refused(BackboneConfig(pretrained=str(copy)), "weights cannot be loaded")


def test_an_image_processor_of_another_size_or_of_varying_sizes_is_refused(copy):
    SiglipImageProcessor(size={"height": 40, "width": 40}).save_pretrained(copy)
    refused(BackboneConfig(pretrained=str(copy)), r"pixels \[3, 40, 40\] of an image of 64x64, its tower takes \[3, 48")
    CLIPImageProcessor(size={"shortest_edge": SIDE}, do_center_crop=False).save_pretrained(copy)
    refused(BackboneConfig(pretrained=str(copy)), r"pixels \[3, 48, 96\] of an image of 96x48")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "owner/name", "pretrained": "webli"}, "brings its own weights; leave backbone.pretrained empty"),
        ({"name": "no/such/folder"}, "neither a directory with transformers' config.json nor OWNER/NAME"),
        ({"name": "owner/name", "token_stages": (1,), "token_grid": 2}, "go with open_clip's models"),
        ({"name": "hf-hub:owner/name", "pretrained": "webli"}, "brings its own weights; leave backbone.pretrained"),
        ({"pretrained": "google/siglip2-large-patch16-384"}, "set backbone.name to a model of the Hub"),
    ],
)
def test_names_that_do_not_go_together_say_what_to_change(keys, message):
    refused(BackboneConfig(**keys), message)


# --- the Hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub without content, and a cache without content."""
    with HubStandIn() as hub:
        hub.stand_in(monkeypatch, tmp_path / "cache")
        yield hub


def publish(hub: HubStandIn, name: str, directory: Path) -> None:
    repository = hub.repositories[name] = Repository()
    repository.commit("main", {file.name: file.read_bytes() for file in directory.iterdir()})


def test_a_model_of_the_hub_loads_by_its_name_and_again_without_network(hub, directory, monkeypatch):
    publish(hub, "owner/model", directory)
    fetched = Backbone.load(BackboneConfig(name="owner/model"), precision="float32")
    assert fetched.fingerprint == load(directory).fingerprint
    hub.repositories.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = Backbone.load(BackboneConfig(name="owner/model"), precision="float32")
    assert again.fingerprint == fetched.fingerprint


def test_an_open_clip_model_of_the_hub_loads_as_its_directory_does(hub, tmp_path, monkeypatch):
    config = write_backbone(tmp_path / "clip")
    publish(hub, "owner/clip", tmp_path / "clip")
    local = Backbone.load(config, precision="float32")
    fetched = Backbone.load(BackboneConfig(name="hf-hub:owner/clip"), precision="float32")
    assert fetched.fingerprint == local.fingerprint
    torch.testing.assert_close(fetched.encode_texts(CAPTIONS), local.encode_texts(CAPTIONS))
    hub.repositories.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = Backbone.load(BackboneConfig(name="hf-hub:owner/clip"), precision="float32")
    assert again.fingerprint == local.fingerprint


def test_an_open_clip_repository_without_weights_is_refused_not_left_at_random(hub, tmp_path):
    write_backbone(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    publish(hub, "owner/clip", tmp_path / "clip")
    refused(BackboneConfig(name="hf-hub:owner/clip"), "hf-hub:owner/clip: cannot be loaded as an open_clip model")


@pytest.mark.parametrize("name", ["owner/absent", "hf-hub:owner/absent"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_model_that_cannot_be_fetched_says_what_to_do(hub, name, offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    refused(BackboneConfig(name=name), f"{name}.*cannot be loaded.*check the name.*set backbone.pretrained to its dir")


# --- all that takes a backbone ---


def test_a_reranker_indexes_ranks_and_is_loaded_again_from_its_checkpoint(directory, tmp_path):
    backbone = Backbone.load(BackboneConfig(name=str(directory)), precision="float32")
    make_model(backbone, tmp_path / "vocab.txt").save_pretrained(tmp_path / "checkpoint")
    names = write_images(tmp_path / "images", 4)
    reranker = Reranker.from_pretrained(tmp_path / "checkpoint", dtype="float32")
    store = reranker.index(tmp_path / "images", tmp_path / "store", progress=False)
    assert store.manifest.backbone == backbone.fingerprint
    ranked = reranker.rank("a red ball", names)
    paths = reranker.rank("a red ball", [tmp_path / "images" / name for name in names])
    assert [hit["corpus_id"] for hit in ranked] == [hit["corpus_id"] for hit in paths]


def test_a_checkpoint_takes_its_backbone_from_a_folder_beside_it(directories, tmp_path, monkeypatch):
    backbone = load(directories["clip"])
    make_model(backbone, tmp_path / "vocab.txt").save_pretrained(tmp_path / "checkpoint")
    shutil.copytree(directories["clip"], tmp_path / "clip")
    config = tmp_path / "checkpoint" / "config.yaml"
    named = f"pretrained: {directories['clip']}"
    assert named in config.read_text()
    config.write_text(config.read_text().replace(named, "pretrained: ''").replace("name: ''", "name: ../clip"))
    monkeypatch.chdir("/")
    assert EDJE.from_pretrained(tmp_path / "checkpoint").config.backbone.name == str(tmp_path / "clip")
    assert Reranker.from_pretrained(tmp_path / "checkpoint").backbone.fingerprint == backbone.fingerprint


def test_a_model_card_names_the_library_and_the_repository(directories, tmp_path):
    model = make_model(load(directories["siglip"]), tmp_path / "vocab.txt")
    named = BackboneConfig(name="google/siglip2-large-patch16-384")
    card = model_card(replace(model.config, backbone=named), "owner/edje")
    assert "transformers model `google/siglip2-large-patch16-384`, for patch tokens and embeddings" in card
    assert "base_model:\n- google/siglip2-large-patch16-384" in card
    here = model_card(replace(model.config, backbone=BackboneConfig(name=str(directories["siglip"]))), "owner/edje")
    assert "transformers model `siglip`" in here and "base_model" not in here


def test_a_checkpoint_is_exported_and_uploaded_under_a_name_that_others_can_load(directories, tmp_path):
    backbone = Backbone.load(BackboneConfig(name=str(directories["clip"])), precision="float32")
    make_model(backbone, tmp_path / "vocab.txt").save_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match=r"backbone.name is .*, which nobody else has.*--backbone-name NAME"):
        upload_checkpoint(tmp_path / "mine", "owner/edje")
    export_checkpoint(tmp_path / "mine", tmp_path / "shared", backbone_name="owner/clip")
    assert EDJE.from_pretrained(tmp_path / "shared").config.backbone == BackboneConfig(name="owner/clip")


def test_the_script_stores_patch_tokens_of_a_named_model(directories, tmp_path, monkeypatch):
    names = write_images(tmp_path / "images", 3)
    arguments = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "store"), "--device", "cpu"]
    named = ["--precision", "float32", "--backbone-name", str(directories["siglip"])]
    monkeypatch.setattr("sys.argv", ["precompute_tokens.py", *arguments, *named])
    precompute_tokens.main()
    store, backbone = TokenStore.open(tmp_path / "store"), load(directories["siglip"])
    assert store.manifest.backbone == backbone.fingerprint
    image = backbone.preprocess(open_image(tmp_path / "images" / names[0]))[None]
    expected = backbone.encode_images(image).patch_tokens
    torch.testing.assert_close(store.gather(names[:1]).float(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("named", [[], ["--checkpoint", "runs/demo", "--backbone-name", "owner/name"]])
def test_the_script_takes_a_checkpoint_or_a_backbone(named, capsys):
    with pytest.raises(SystemExit, match="2"):
        precompute_tokens.parse_arguments(["--images", "photos", "--out", "store", *named])
    assert "pass either --checkpoint, or a backbone" in capsys.readouterr().err


def test_a_run_trains_on_images_and_its_checkpoint_is_evaluated_from_any_folder(
    directories, run_config, annotations, tmp_path, monkeypatch
):
    """Workers prepare the images; the run names its backbone by a folder that is relative to where it was started."""
    monkeypatch.chdir(directories["clip"].parent)
    named = ["backbone.name=clip", "backbone.pretrained=", "training.steps=2", "data.num_workers=2"]
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(run_config), *named])
    train.main()
    monkeypatch.chdir("/")
    model = EDJE.from_pretrained(tmp_path / "run")
    assert model.config.backbone == BackboneConfig(name=str(directories["clip"]))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--dataset", str(annotations), "--k", "3"]
    where = ["--data-root", str(annotations.parent), "--out", str(tmp_path / "results"), "--device", "cpu"]
    evaluate_retrieval.main([*arguments, *where])
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"]["backbone"] == "clip" and results["images"] == 12


# --- real sizes, random weights ---

LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
# Vocabularies are cut to the tiny tokenizers': a gigabyte of look-up table.
SIGLIP2_L16_384 = dict(
    vision_config=LARGE | dict(image_size=384, patch_size=16),
    text_config=LARGE | dict(vocab_size=58, max_position_embeddings=64, projection_size=1024),
)
CLIP_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
CLIP_L14_336 = dict(
    vision_config=LARGE | dict(image_size=336, patch_size=14),
    text_config=CLIP_TEXT | dict(vocab_size=54, max_position_embeddings=77, bos_token_id=0, eos_token_id=53),
    projection_dim=768,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "processor", "dims"),
    [
        (
            "siglip",
            SIGLIP2_L16_384,
            SiglipImageProcessor(size={"height": 384, "width": 384}, resample=2),
            (576, 1024, 1024),
        ),
        (
            "clip",
            CLIP_L14_336,
            CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
            (576, 1024, 768),
        ),
    ],
    ids=["SigLIP2-L16-384", "CLIP-L14-336"],
)
@torch.no_grad()
def test_real_sizes_agree_with_the_models_own_calls(kind, config, processor, dims, directories, tmp_path):
    model_class = KINDS[kind][0]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directories[kind])
    tokenizer.save_pretrained(tmp_path)
    backbone = load(tmp_path)
    patches, width, embedding = dims
    assert backbone.dims == BackboneDims(num_patches=patches, patch_width=width, embedding_width=embedding)
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((500, 333), (200, 640))]
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack([backbone.preprocess(image) for image in images]), inputs)
    check_images(backbone, model, inputs)
    context = config["text_config"]["max_position_embeddings"]
    captions = [caption.lower() for caption in CAPTIONS]
    tokens = tokenizer(captions, padding="max_length", max_length=context, truncation=True, return_tensors="pt")
    expected = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(backbone.encode_texts(CAPTIONS), expected, rtol=0, atol=1e-5)
