"""The exported graphs, run by onnxruntime, are the model: logits to 1e-4, tokens, captions, lengths of any mixture."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from models.config import AdapterConfig, BackboneDims, EDJEConfig, EncoderConfig
from models.edje import EDJE
from models.errors import UserError
from models.integrations import onnx as integration
from models.integrations.onnx import BOUND, FILES, export_onnx
from models.language.captions import CaptionTokenizer
from tests.processes import ROOT

CHECKPOINT = ROOT / "configs" / "pretrained" / "scenes"
CAPTIONS = [
    "a red ball",
    "an orange cross with a pink star below it",
    "",
    "A  Red_Ball, left of “the” BLUE star’s [SEP] [CLS] !!!",
    " ".join(["a small green triangle to the right of a large circle"] * 10),
]


@pytest.fixture(scope="module")
def model() -> EDJE:
    return EDJE.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model) -> Path:
    """Written over an earlier export."""
    out = tmp_path_factory.mktemp("onnx") / "scenes"
    out.mkdir()
    (out / "joint.onnx").write_text("an earlier one")
    assert 0 < export_onnx(model, out) < BOUND
    return out


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def encoded(directory: Path, captions: list[str]) -> dict[str, np.ndarray]:
    encodings = Tokenizer.from_file(str(directory / "tokenizer.json")).encode_batch(captions)
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings]),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
    }


def test_an_export_holds_what_its_description_names(exported, model):
    assert sorted(path.name for path in exported.iterdir()) == sorted(FILES)
    config = json.loads((exported / "config.json").read_text())
    assert config["adapter_fingerprint"] == model.adapter_fingerprint
    assert config["fusion_lambda"] == model.config.fusion_lambda


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_logits_of_raw_captions_and_any_number_of_tokens_are_the_models(exported, model, tokens):
    torch.manual_seed(tokens)
    vision = torch.randn(len(CAPTIONS), tokens, 128)
    inputs = encoded(exported, CAPTIONS) | {"vision_tokens": vision.numpy()}
    (logits,) = session(exported / "joint.onnx").run(None, inputs)
    ours = model.score(CAPTIONS, vision)
    assert logits.dtype == np.float32 and logits.shape == (len(CAPTIONS),)
    assert ours.std() > 0.01  # logits of different pairs differ by far more than the bound
    np.testing.assert_allclose(logits, ours.numpy(), rtol=0, atol=BOUND)


def test_padding_and_neighbours_change_no_logit(exported):
    torch.manual_seed(0)
    joint, vision = session(exported / "joint.onnx"), torch.randn(len(CAPTIONS), 16, 128).numpy()
    (together,) = joint.run(None, encoded(exported, CAPTIONS) | {"vision_tokens": vision})
    for row, caption in enumerate(CAPTIONS):
        alone = encoded(exported, [caption]) | {"vision_tokens": vision[row : row + 1]}
        np.testing.assert_allclose(joint.run(None, alone)[0], together[row : row + 1], rtol=0, atol=1e-5)


def test_vision_tokens_of_patches_are_the_models(exported, model):
    torch.manual_seed(0)
    patches = torch.randn(3, 64, 128)
    (tokens,) = session(exported / "adapter.onnx").run(None, {"patch_tokens": patches.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(tokens, model.compress(patches).numpy(), rtol=0, atol=BOUND)


def test_the_tokenizer_reads_captions_as_the_model_does(exported, model):
    captions = [*CAPTIONS, "Ein Café, naïve &co. -- x_y_z", "TWO\tdogs\n(by the sea)", "100% RED…"]
    read = encoded(exported, captions)
    ids = model.tokenizer(captions, max_pieces=model.max_joint_pieces)
    for row, pieces in enumerate(ids.ids.split(ids.lengths.tolist())):
        wanted = [model.tokenizer.cls_id, *pieces.tolist(), model.tokenizer.sep_id]
        assert read["input_ids"][row][read["attention_mask"][row] == 1].tolist() == wanted, captions[row]


def small_model(**options) -> EDJE:
    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.from_pretrained(CHECKPOINT)
    adapter, _ = AdapterConfig.class_for({"kind": options.pop("kind", "compression")})
    return EDJE(
        EDJEConfig(
            backbone=EDJE.from_pretrained(CHECKPOINT).config.backbone,
            dims=BackboneDims(num_patches=16, patch_width=16, embedding_width=8),
            adapter=adapter(num_tokens=4, mlp_width=8, num_heads=2),
            encoder=EncoderConfig(
                vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16
            ),
            **options,
        ),
        tokenizer,
    ).eval()


@pytest.mark.parametrize("kind", ["local", "pooling"])
def test_other_kinds_of_adapter_are_exported(tmp_path, kind):
    model, patches = small_model(kind=kind), torch.randn(3, 16, 16)
    integration._export_adapter(model, tmp_path / "adapter.onnx")
    (tokens,) = session(tmp_path / "adapter.onnx").run(None, {"patch_tokens": patches.numpy()})
    np.testing.assert_allclose(tokens, model.compress(patches).detach().numpy(), rtol=0, atol=BOUND)


def test_a_model_that_adds_the_similarity_takes_it_as_an_input(tmp_path):
    model = small_model(residual_similarity=10.0)
    assert export_onnx(model, tmp_path / "out") < BOUND
    inputs = encoded(tmp_path / "out", ["a red ball"]) | {"vision_tokens": np.zeros((1, 4, 16), np.float32)}
    joint = session(tmp_path / "out" / "joint.onnx")
    low, high = (joint.run(None, inputs | {"similarities": np.array([s], np.float32)})[0] for s in (0.1, 0.3))
    np.testing.assert_allclose(high - low, 2.0, atol=1e-5)


def test_a_graph_that_disagrees_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "largest_difference", lambda model, directory: float("nan"))
    monkeypatch.setattr(integration, "_export", lambda module, path, *rest: path.touch())
    with pytest.raises(UserError, match="logits differ from the model's by nan, expected at most 1e-04; nothing was"):
        export_onnx(small_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_but_an_earlier_export_is_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is no ONNX export \(holds notes.txt\); choose another path"):
        export_onnx(small_model(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="adapter.kind is 'kmeans'.*export a model of another kind"):
        export_onnx(small_model(kind="kmeans"), tmp_path / "out")
    with pytest.raises(UserError, match="the longest input has 604 tokens, the joint encoder 512 positions"):
        export_onnx(small_model(max_caption_tokens=600), tmp_path / "out")
    with pytest.raises(UserError, match="got OptimizedEDJE .* expected an EDJE in float32 on the CPU"):
        export_onnx(small_model().optimized(torch.float32), tmp_path / "out")
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'onnxruntime not installed; run: pip install "edje\[onnx\]"'):
        export_onnx(small_model(), tmp_path / "out")
