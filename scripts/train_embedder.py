"""Train an open_clip model contrastively on a Karpathy data set; the result is a directory that the backbone loads.

    python scripts/train_embedder.py --config configs/embedders/emoji_scratch.yaml \\
        --annotations emoji/dataset_emoji.json --root emoji --out runs/embedder_emoji

Training stops when validation recall stops rising, resumes after a kill, and writes open_clip_config.json,
open_clip_model.safetensors, the tokenizer and TRAINING.json (origin, seed, steps, recall, hash of the weights).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import open_clip
import torch
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from tqdm import tqdm

from data.caption_datasets import load_annotations
from evaluation.provenance import stamp
from models.config_io import from_dict
from models.distributed import pick_device
from models.errors import UserError, run_entry_point
from models.files import write_atomically
from models.language.captions import build_vocabulary
from models.language.pretrained import resolve_pretrained
from models.precision import fastest_dtype
from models.state_dicts import half_precision, write_safetensors
from models.vision.open_clip_backbone import CONFIG_FILE, WEIGHTS_FILE, OpenClipModel, load_directory
from training.config import read_with_base
from training.embedder.samples import Samples, load_samples, normalise
from training.embedder.training import EmbedderConfig, EmbedderTraining, Progress

STATE_FILE = "training_state.pt"
RECORD_FILE = "TRAINING.json"
TEXT_FOLDER = "text"
FEATURE_BATCH = 64


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of an EmbedderConfig")
    parser.add_argument("--annotations", type=Path, required=True, help="Karpathy JSON with splits train and val")
    parser.add_argument("--root", type=Path, required=True, help="folder that the file's image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; resumes a training begun there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="overrides the config's max_steps")
    parser.add_argument("--minutes", type=float, help="end within this many minutes of training")
    parser.add_argument("--patience", type=int, help="overrides the config's patience")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    config = read_config(arguments)
    out: Path = arguments.out
    if (out / RECORD_FILE).exists():
        print(f"{out} already holds a trained embedder; remove it to train again")
        return
    datasets = [load_annotations(arguments.annotations, arguments.root, split) for split in ("train", "val")]
    out.mkdir(parents=True, exist_ok=True)
    clip = build_model(config, datasets[0].captions, out, arguments.seed)
    clip.to(pick_device(arguments.device))
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    sides = (config.cached_side, config.image_side)
    train, val = (
        load_samples(dataset, config.preprocess, side, tokenize) for dataset, side in zip(datasets, sides, strict=True)
    )
    dtype = fastest_dtype(clip.logit_scale.device)
    if config.towers:
        for samples in (train, val):
            replace_by_features(samples, clip, config, dtype)
    learned = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    print(f"{len(train.images)} images, {len(train.texts)} captions; {learned / 1e6:.2f}M weights to train, {dtype}")
    training = EmbedderTraining(config, clip, train, val, arguments.seed, dtype)
    progress = training.run(out / STATE_FILE, arguments.minutes)
    write_weights(clip, out / WEIGHTS_FILE, config.half)
    write_record(arguments, progress, out)
    (out / STATE_FILE).unlink()


def read_config(arguments: argparse.Namespace) -> EmbedderConfig:
    if not arguments.config.is_file():
        raise UserError(f"{arguments.config}: no such config; see configs/embedders")
    content = read_with_base(arguments.config)
    overrides = {"max_steps": arguments.steps, "patience": arguments.patience}
    content |= {key: value for key, value in overrides.items() if value is not None}
    return from_dict(EmbedderConfig, content, where=str(arguments.config))


def build_model(config: EmbedderConfig, captions: Sequence[str], out: Path, seed: int) -> OpenClipModel:
    """Write tokenizer and open_clip_config.json to `out`, then build the model from them, weights initialised."""
    text = config.model["text_cfg"]
    if config.towers:
        text_source = Path(resolve_pretrained(config.towers.text))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(text_source / name, out / name)
        (out / TEXT_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(text_source / "config.json", out / TEXT_FOLDER / "config.json")
        text |= {"hf_model_name": TEXT_FOLDER, "hf_tokenizer_name": "."}
    else:
        text |= write_tokenizer(captions, out)
    document = {"model_cfg": config.model, "preprocess_cfg": config.preprocess}
    (out / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
    torch.manual_seed(seed)
    clip = load_directory(out, load_weights=False)
    if config.towers:
        load_towers(clip, Path(resolve_pretrained(config.towers.image)), text_source)
    return clip


def write_tokenizer(captions: Sequence[str], out: Path) -> dict:
    """A WordPiece tokenizer over the words of `captions`; returns what open_clip's text_cfg must say about it."""
    vocabulary = out / "vocab.txt"
    build_vocabulary(captions, vocabulary)
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.save(str(out / "tokenizer.json"))
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    vocabulary.unlink()  # tokenizer.json holds it
    # Causal text tower pooled at [SEP]: what follows, the padding, changes nothing.
    specials_of_clip = {"pool_type": "eos", "eos_id": tokenizer.token_to_id("[SEP]"), "pad_id": 0}
    return {"vocab_size": tokenizer.get_vocab_size(), "hf_tokenizer_name": ".", **specials_of_clip}


def load_towers(clip: OpenClipModel, image_folder: Path, text_folder: Path) -> None:
    """Load pretrained weights into both towers and freeze them; the heads and the logit scale stay trainable."""
    files = sorted(image_folder.glob("*.pth"))  # a pickled state keeps its order, safetensors does not
    if len(files) != 1:
        raise UserError(f"{image_folder}: {len(files)} files *.pth; expected one, the weights of the image tower")
    source = torch.load(files[0], map_location="cpu", weights_only=True)
    trunk = clip.visual.trunk
    trunk.load_state_dict(match_in_order(source, trunk.state_dict(), str(files[0])))
    text = load_file(text_folder / "model.safetensors")
    expected = clip.text.transformer.state_dict()
    missing = [name for name in expected if name not in text]
    if missing:
        raise UserError(f"{text_folder}: model.safetensors lacks {missing[0]} and {len(missing) - 1} more tensors")
    clip.text.transformer.load_state_dict({name: text[name] for name in expected})
    clip.visual.trunk.requires_grad_(False)
    clip.text.transformer.requires_grad_(False)


def match_in_order(source: dict[str, Tensor], target: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of `source` under the names of `target`, one to one in order; a trailing classifier is left out.

    Raises UserError at the first shape or kind that differs, so that no tensor lands on the wrong parameter."""
    matched = {}
    for (name, tensor), (source_name, value) in zip(target.items(), source.items(), strict=False):
        if value.shape != tensor.shape or name.rsplit(".")[-1] != source_name.rsplit(".")[-1]:
            raise UserError(f"{where}: {source_name} {list(value.shape)} does not fit {name} {list(tensor.shape)}")
        matched[name] = value
    if len(matched) != len(target) or any(value.ndim > 2 for value in list(source.values())[len(target) :]):
        raise UserError(f"{where}: {len(source)} tensors for the {len(target)} of the image tower")
    return matched


@torch.no_grad()
def replace_by_features(samples: Samples, clip: OpenClipModel, config: EmbedderConfig, dtype: torch.dtype) -> None:
    """Pixels -> pooled features of the image tower, token ids -> pooled features of the text tower, once."""
    clip.eval()
    device, text = clip.logit_scale.device, clip.text
    lengths = (samples.texts != text.config.pad_token_id).sum(1)
    order = lengths.argsort()  # captions of like length together: little padding
    images, texts = [], []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        for pixels in tqdm(samples.images.split(FEATURE_BATCH), desc="image features", unit="batch"):
            pixels = normalise(pixels.to(device), config.preprocess).contiguous(memory_format=torch.channels_last)
            images.append(clip.visual.trunk(pixels).float().cpu())
        for rows in tqdm(order.split(4 * FEATURE_BATCH), desc="text features", unit="batch"):
            ids = samples.texts[rows, : lengths[rows].max()].to(device)
            mask = (ids != text.config.pad_token_id).long()
            texts.append(text.pooler(text.transformer(input_ids=ids, attention_mask=mask), mask).float().cpu())
    samples.images, samples.texts = torch.cat(images), torch.cat(texts)[order.argsort()]


def write_weights(clip: OpenClipModel, file: Path, half: bool) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.state_dict().items()}
    if half:
        state = half_precision(state)
    write_safetensors(file, state)


def write_record(arguments: argparse.Namespace, progress: Progress, out: Path) -> None:
    """TRAINING.json: how to repeat this training, and its results. Paths are cut to their last part."""
    command = f"python scripts/train_embedder.py --config {Path('configs/embedders', arguments.config.name)}"
    command += f" --annotations {arguments.annotations.name} --root {arguments.root.name} --out {out.name}"
    command += f" --seed {arguments.seed}"
    for name in ("steps", "minutes", "patience"):
        command += f" --{name} {getattr(arguments, name)}" if getattr(arguments, name) is not None else ""
    record = {
        "provenance": replace(stamp(pick_device(arguments.device)), command=command).to_json(),
        "seed": arguments.seed,
        "steps": progress.step,
        "seconds": round(progress.seconds),
        "cooldown_start": progress.cooldown_start,
        "best_step": progress.best_step,
        "validation_R@1_mean": round(progress.best_recall, 2),
        "weights_sha256": hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "history": progress.history,
    }
    write_atomically(out / RECORD_FILE, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_entry_point(main)
