"""EDJE as ONNX graphs, for serving without torch: the adapter, and the joint encoder with its match head.

    export_onnx(EDJE.from_pretrained("runs/demo"), "demo-onnx")     # pip install "edje[onnx]"

writes a directory:

    adapter.onnx     patch_tokens [B, P, Dv] float32 -> vision_tokens [B, m, H]; once per image
    joint.onnx       input_ids, attention_mask [Q, L] int64, vision_tokens [Q, t, H] float32 -> logits [Q] float32;
                     with `similarities` [Q] float32 where the model adds the first-stage cosine to its logit
    tokenizer.json   for the package `tokenizers`: raw captions -> input_ids and attention_mask
    config.json      the checkpoint's configuration, as config.yaml has it, and the adapter's fingerprint

B, Q and L vary, and so does t: the first t of an image's m vision tokens, as with `tokens=` elsewhere. P patches of
width Dv and the joint encoder's width H are the model's. Captions are padded on the right and masked; positions are
counted through from the caption's own length, so that padding changes no logit.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from ..config import KMeansConfig
from ..config_io import to_dict
from ..encoder.encoder_pass import EncoderPass, EncoderWeights
from ..encoder.packing import PackedInput
from ..errors import UserError
from ..files import atomic_directory
from ..language.captions import TOKENIZER_FILE, CaptionIds, CaptionTokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from ..edje import EDJE

ADAPTER_FILE, JOINT_FILE, CONFIG_FILE = "adapter.onnx", "joint.onnx", "config.json"
FILES = (ADAPTER_FILE, JOINT_FILE, TOKENIZER_FILE, CONFIG_FILE)
OPSET = 20
"""The first with an operator for GELU. Attention, an operator of 23, is left in its parts: onnxruntime fuses them, and
its own kernel refuses a mask that all queries share."""
BOUND = 1e-4
"""A logit of the exported graph lies within this of the model's own, in float32."""
_DELETED = Regex(r"[!-/:-@\[-^`{-~\u02bc\u2018-\u201f]")
"""ASCII punctuation but for the underscore, and the typographic quotes that captions.canonical_caption first turns into
ASCII's."""


def export_onnx(model: EDJE, directory: str | Path) -> float:
    """Write the files above; returns the largest difference of onnxruntime's logits from the model's own, on random
    captions and tokens.

    An earlier export is replaced. Raises UserError if a package is missing, `directory` holds anything else, the model
    is not float32 on the CPU, has an adapter by k-means or too few positions for its longest input, or the difference
    exceeds BOUND; nothing is written then."""
    check_packages("onnx", "onnxscript", "onnxruntime")
    directory = Path(directory)
    _check_replaceable(directory)
    _check_exportable(model)
    with atomic_directory(directory) as temporary:
        _export_adapter(model, temporary / ADAPTER_FILE)
        _export_joint(model, temporary / JOINT_FILE)
        write_serving_tokenizer(model.tokenizer, model.max_joint_pieces, temporary)
        settings = to_dict(model.config) | {"adapter_fingerprint": model.adapter_fingerprint}
        (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        difference = largest_difference(model, temporary)
        if not difference <= BOUND:  # a NaN is no agreement either
            raise UserError(
                f"{directory}: onnxruntime's logits differ from the model's by {difference:.1e}, expected at most "
                f"{BOUND:.0e}; nothing was written; try other releases of torch and onnxruntime"
            )
    return difference


def write_serving_tokenizer(tokenizer: CaptionTokenizer, max_pieces: int, directory: Path) -> None:
    """Write a tokenizer.json that does all that joint.onnx expects: canonical form, [CLS] and [SEP], at most
    `max_pieces` between them, padding.

    Equal to CaptionTokenizer but for the repair of mojibake and HTML entities, which is no job of a tokenizer:
    ftfy.fix_text and html.unescape do it."""
    tokenizer.save(directory)
    settings = json.loads((directory / TOKENIZER_FILE).read_text(encoding="utf-8"))
    settings["added_tokens"] = []  # else a caption could spell a special token
    serving = Tokenizer.from_str(json.dumps(settings))
    canonical = [normalizers.NFC(), normalizers.Replace("_", " "), normalizers.Replace(_DELETED, "")]
    serving.normalizer = normalizers.Sequence([*canonical, normalizers.Lowercase(), serving.normalizer])
    frame = [("[CLS]", tokenizer.cls_id), ("[SEP]", tokenizer.sep_id)]
    serving.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    serving.enable_truncation(max_pieces + len(frame))
    serving.enable_padding(pad_id=tokenizer.pad_id, pad_token="[PAD]")
    serving.save(str(directory / TOKENIZER_FILE))


@torch.no_grad()
def largest_difference(model: EDJE, directory: str | Path) -> float:
    """Largest difference of the logits of an export from those of its model, from patch tokens on: 8 random images
    under random captions of 0 to the most pieces that are read, with all their vision tokens and with the first."""
    dims, pairs = model.config.dims, 8
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(pairs, dims.num_patches, dims.patch_width, generator=generator)
    lengths = torch.linspace(0, model.max_joint_pieces, pairs).long()
    ids = torch.randint(model.tokenizer.vocab_size, (int(lengths.sum()),), generator=generator)
    captions = CaptionIds(ids, lengths)
    similarities = torch.rand(pairs, generator=generator) if model.config.residual_similarity else None
    adapter, joint = (open_session(Path(directory) / name) for name in (ADAPTER_FILE, JOINT_FILE))
    (exported,) = adapter.run(None, {"patch_tokens": patches.numpy()})
    tokens = model.compress(patches)
    differences = []
    for kept in {1, model.config.num_vision_tokens}:
        inputs = joint_inputs(model.tokenizer, captions, torch.from_numpy(exported[:, :kept]), similarities)
        (logits,) = joint.run(None, {name: value.numpy() for name, value in inputs.items()})
        index = torch.arange(pairs)
        ours = model.match_logits(captions, tokens[:, :kept], index, index, similarities)
        differences.append((torch.from_numpy(logits) - ours).abs().max().item())
    return max(differences)


def open_session(path: Path, threads: int = 0) -> InferenceSession:
    """An onnxruntime session on the CPU; threads: 0 for its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def joint_inputs(
    tokenizer: CaptionTokenizer, captions: CaptionIds, tokens: Tensor, similarities: Tensor | None = None
) -> dict[str, Tensor]:
    """Inputs of joint.onnx for Q captions, already cut, and the tokens [Q, t, H] of their images."""
    lengths = captions.lengths[:, None] + 2
    place = torch.arange(int(lengths.max())).expand(len(lengths), -1)
    is_piece = (place > 0) & (place < lengths - 1)
    ids = torch.full_like(place, tokenizer.pad_id).masked_fill(place == 0, tokenizer.cls_id)
    ids = ids.masked_fill(place == lengths - 1, tokenizer.sep_id).masked_scatter(is_piece, captions.ids)
    inputs = {"input_ids": ids, "attention_mask": (place < lengths).long(), "vision_tokens": tokens}
    return inputs if similarities is None else inputs | {"similarities": similarities}


def check_packages(*names: str) -> None:
    """Raise UserError that says what to install unless all are there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX export: {", ".join(missing)} not installed; run: pip install "edje[onnx]"')


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    foreign = sorted({*os.listdir(directory)} - {*FILES}) if directory.is_dir() else ["a file"]
    if foreign:
        raise UserError(f"{directory}: exists and is no ONNX export (holds {foreign[0]}); choose another path")


def _check_exportable(model: EDJE) -> None:
    weight = model.match_head.dense.weight
    if not isinstance(model, nn.Module) or weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise UserError(
            f"ONNX export: got {type(model).__name__} in {weight.dtype} on {weight.device}; expected an EDJE in "
            "float32 on the CPU, as EDJE.from_pretrained(...) loads it"
        )
    longest = model.config.max_caption_tokens + model.config.num_vision_tokens
    positions = model.encoder.config.max_positions
    if longest > positions:
        raise UserError(
            f"ONNX export: the longest input has {longest} tokens, the joint encoder {positions} positions; extend "
            f"them first: model.encoder.extend_positions({longest})"
        )
    if isinstance(model.config.adapter, KMeansConfig):
        raise UserError(
            "ONNX export: adapter.kind is 'kmeans', an ablation whose distances ONNX has no operator for; export a "
            "model of another kind"
        )


class _Adapter(nn.Module):
    """adapter.onnx"""

    def __init__(self, model: EDJE):
        super().__init__()
        self.adapter = model.adapter

    def forward(self, patch_tokens: Tensor) -> Tensor:
        tokens: Tensor = self.adapter(patch_tokens)
        return tokens


class _PaddedEncoder(EncoderPass):
    """The joint encoder's mathematics on padded rows, with the weights of another form of it."""

    training = False

    def __init__(self, encoder: EncoderPass):
        self.config, self.special, self._weights = encoder.config, encoder.special, encoder.weights()

    def weights(self) -> EncoderWeights:
        return self._weights

    @property
    def word_table(self) -> Tensor:
        return self._weights.words

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.words.dtype

    def encode_padded(self, input_ids: Tensor, attention_mask: Tensor, vision_tokens: Tensor) -> Tensor:
        """[CLS] caption [SEP] padding v1 .. vt [SEP], the padding unseen: [Q, L], [Q, L], [Q, t, H] -> [Q, H]."""
        pairs, caption_rows = input_ids.shape
        words = nn.functional.embedding(input_ids, self._weights.words)
        end = self._weights.words[self.special.sep_id].expand(pairs, 1, -1)
        embeddings = torch.cat([words, vision_tokens, end], dim=1)
        vision = torch.arange(vision_tokens.shape[1] + 1).expand(pairs, -1)
        caption = torch.arange(caption_rows).expand(pairs, -1)
        positions = torch.cat([caption, attention_mask.sum(1, keepdim=True) + vision], dim=1)
        segments = torch.cat([torch.zeros_like(caption), torch.ones_like(vision)], dim=1)
        seen = torch.cat([attention_mask, torch.ones_like(vision)], dim=1)
        rows = caption_rows + vision.shape[1]
        packed = PackedInput(
            embeddings=embeddings.flatten(0, 1),
            positions=positions.flatten(),
            segments=segments.flatten(),
            groups=(),  # the attention below knows where sequences lie
            cls_rows=rows * torch.arange(pairs),
            caption_rows=torch.arange(0),
        )
        return self._encode_cls(packed, _PaddedAttention(seen, self.config.num_heads), self._weights)


class _PaddedAttention:
    """Attention within Q sequences of S rows each, as encoder_pass calls it, in operators that every runtime has."""

    def __init__(self, seen: Tensor, num_heads: int):
        """seen: [Q, S], 0 where a row is padding."""
        self.sequences, self.num_heads = len(seen), num_heads
        self.bias = torch.where(seen == 0, torch.finfo(torch.float32).min, 0.0)[:, None, None]

    def __call__(self, queries: Tensor, keys_values: Tensor, one_query: bool = False) -> Tensor:
        """queries [Q * S, H], or [Q, H] with one_query; keys_values [Q * S, 2H] -> the shape of the queries."""
        query, key, value = map(self._heads, (queries, *keys_values.chunk(2, dim=1)))
        scores = query @ (key * query.shape[-1] ** -0.5).transpose(-1, -2)
        context = torch.softmax(scores + self.bias, dim=-1) @ value
        return context.transpose(1, 2).reshape(-1, queries.shape[1])

    def _heads(self, rows: Tensor) -> Tensor:
        """[Q * S, H] -> [Q, heads, S, d]"""
        width = rows.shape[1] // self.num_heads
        return rows.reshape(self.sequences, -1, self.num_heads, width).transpose(1, 2)


class _Joint(nn.Module):
    """joint.onnx"""

    def __init__(self, model: EDJE):
        super().__init__()
        self.encoder, self.logits_of = _PaddedEncoder(model.encoder), model.logits_of

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, vision_tokens: Tensor, similarities: Tensor | None = None
    ) -> Tensor:
        return self.logits_of(self.encoder.encode_padded(input_ids, attention_mask, vision_tokens), similarities)


@torch.no_grad()
def _export_adapter(model: EDJE, path: Path) -> None:
    dims = model.config.dims
    patches = torch.zeros(2, dims.num_patches, dims.patch_width)
    _export(_Adapter(model), path, {"patch_tokens": patches}, {"patch_tokens": {0: "images"}}, "vision_tokens")


@torch.no_grad()
def _export_joint(model: EDJE, path: Path) -> None:
    captions = CaptionIds(torch.arange(4), torch.tensor([3, 1]))
    tokens = torch.zeros(2, model.config.num_vision_tokens, model.config.encoder.hidden_size)
    similarities = torch.zeros(2) if model.config.residual_similarity else None
    inputs = joint_inputs(model.tokenizer, captions, tokens, similarities)
    varying = {
        "input_ids": {0: "pairs", 1: "caption"},
        "attention_mask": {0: "pairs", 1: "caption"},
        "vision_tokens": {0: "pairs", 1: "tokens"},
        "similarities": {0: "pairs"},
    }
    _export(_Joint(model), path, inputs, {name: varying[name] for name in inputs}, "logits")


def _export(
    module: nn.Module, path: Path, inputs: dict[str, Tensor], varying: dict[str, dict[int, str]], output: str
) -> None:
    """Write one graph; `varying` names the dimensions of each input that may have any size."""
    with _without_remarks():
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=varying,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # as it is with dynamo=True
    program.save(path, external_data=False)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence for what the exporter says of every export: dimensions that inputs share, constants that stay."""
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name: ", UserWarning)
            yield
    finally:
        logger.setLevel(level)
