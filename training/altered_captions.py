"""Captions made false by changing a word or two: negatives that differ from the positive in one attribute or relation.

"a red ball left of a blue box" -> "a blue ball left of a red box", or "a red ball right of a blue box". Other negatives
differ in several things at once, of which the joint encoder learns the easiest; these leave it one. Source: Yuksekgonul
et al., "When and why vision-language models behave like bags-of-words" (NegCLIP), with word lists for its parser.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from models.errors import UserError
from models.language.captions import CaptionIds, CaptionTokenizer

WordGroups = Sequence[Sequence[Sequence[str]]]
"""Groups of meanings that exclude each other, each its words: [[[left], [right]], [[over, above], [under]]]"""


class CaptionAlterer:
    """Draws altered captions by the word groups of one configuration."""

    def __init__(self, groups: WordGroups, tokenizer: CaptionTokenizer, key: str):
        """Raises UserError, naming the configuration `key`, for a group with one meaning, and for a word that occurs
        twice or that the vocabulary splits into pieces."""
        self._group, self._meaning = (np.full(tokenizer.vocab_size, -1) for _ in range(2))
        self._words: list[list[list[int]]] = []
        for number, group in enumerate(groups):
            if len(group) < 2:
                raise UserError(f"{key}: {list(map(list, group))} has no other meaning to change to; name two or more")
            self._words.append([whole_words(words, tokenizer, key).tolist() for words in group])
            for meaning, (words, pieces) in enumerate(zip(group, self._words[-1], strict=True)):
                for word, piece in zip(words, pieces, strict=True):
                    if self._group[piece] >= 0:
                        raise UserError(f"{key}: {word} occurs twice; a word has one meaning")
                    self._group[piece], self._meaning[piece] = number, meaning

    def __call__(self, captions: CaptionIds, streams: Sequence[np.random.Generator]) -> tuple[CaptionIds, torch.Tensor]:
        """C captions -> (the altered ones, [C] bool: which have any such word; the others stay as they are).

        Of each caption one group that occurs is drawn, uniformly. Two of its words with different meanings change
        places; where all mean the same, one becomes a word of another meaning. streams: random numbers of each."""
        ends = captions.offsets.tolist()
        ids = captions.ids.numpy().copy()
        changed = [self._alter(ids[ends[c] : ends[c + 1]], stream) for c, stream in enumerate(streams)]
        return CaptionIds(torch.from_numpy(ids), captions.lengths), torch.tensor(changed)

    def _alter(self, ids: np.ndarray, stream: np.random.Generator) -> bool:
        """Alter the pieces of one caption in place; whether there was anything to alter."""
        groups = np.unique(self._group[ids])
        groups = groups[groups >= 0]
        if not len(groups):
            return False
        group = stream.choice(groups)
        positions = stream.permutation(np.flatnonzero(self._group[ids] == group))
        first, meanings = positions[0], self._meaning[ids[positions]]
        others = positions[meanings != meanings[0]]
        if len(others):
            ids[[first, others[0]]] = ids[[others[0], first]]
        else:
            wrong = [words for meaning, words in enumerate(self._words[group]) if meaning != meanings[0]]
            ids[first] = stream.choice(wrong[stream.integers(len(wrong))])
        return True


def whole_words(words: Sequence[str], tokenizer: CaptionTokenizer, key: str) -> torch.Tensor:
    """Vocabulary numbers of `words`. Raises UserError, naming the configuration `key`, for words that the vocabulary
    splits into pieces."""
    split = [word for word in words if word not in tokenizer.vocab]
    if split:
        raise UserError(
            f"{key}: {', '.join(split)} {'is' if len(split) == 1 else 'are'} no whole word of the tokenizer's "
            "vocabulary; name words that it does not split"
        )
    return torch.tensor([tokenizer.vocab[word] for word in words])
