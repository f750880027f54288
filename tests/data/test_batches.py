"""Batches are a function of (seed, number): any start, any number of ranks, any number of workers give the same."""

from functools import partial

import numpy as np
import pytest
import torch

from data.batches import BatchPlan, ImageRows, StoredRows, TrainingBatches
from data.caption_datasets import load_annotations
from models.errors import UserError
from models.stores.token_store import TokenStore


@pytest.fixture(scope="module")
def dataset(scenes, annotations):
    return load_annotations(annotations, scenes, "train")


def share(value: float, number: int) -> float:
    return value


def join(batches):
    return {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("rows", "images", "captions", "content")
    }


def test_every_image_comes_once_an_epoch_each_time_in_another_order(dataset):
    plan = BatchPlan(dataset, batch_size=8, seed=1)
    epochs = [np.concatenate([plan.images(n) for n in range(e * 6, e * 6 + 6)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_a_batch_across_two_epochs_holds_the_end_of_one_and_the_start_of_the_next(dataset):
    plan = BatchPlan(dataset, batch_size=20, seed=1)
    run = np.concatenate([plan.images(n) for n in range(12)])
    assert all(sorted(run[e * 48 : e * 48 + 48]) == list(range(48)) for e in range(5))


def test_captions_belong_to_their_images_and_vary(dataset):
    plan = BatchPlan(dataset, batch_size=8, seed=1)
    drawn = [plan.caption(3, row) for row in range(50)]
    assert {dataset.caption_image[c] for c in drawn} == {3} and len(set(drawn)) == 5


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_ranks_together_read_the_batch_of_one_process(dataset, backbone, num_ranks):
    plan = BatchPlan(dataset, batch_size=8, seed=1)
    whole = join([TrainingBatches(plan, ImageRows(backbone.preprocess))[5]])
    parts = join([TrainingBatches(plan, ImageRows(backbone.preprocess), r, num_ranks)[5] for r in range(num_ranks)])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_reading_ahead_with_workers_changes_nothing(dataset, backbone):
    batches = TrainingBatches(BatchPlan(dataset, batch_size=4, seed=1), ImageRows(backbone.preprocess))
    for plain, ahead in zip(batches.read(2, 5, 0), batches.read(2, 5, 2), strict=True):
        assert plain.number == ahead.number and torch.equal(plain.content, ahead.content)


def test_ranks_that_do_not_divide_the_batch_are_refused(dataset, backbone):
    with pytest.raises(UserError, match="8 rows, which 3 ranks"):
        TrainingBatches(BatchPlan(dataset, batch_size=8, seed=1), ImageRows(backbone.preprocess), 0, 3)


def test_groups_hold_neighbours_of_their_anchor_and_no_image_twice(dataset):
    generator = torch.Generator().manual_seed(0)
    neighbours = torch.stack([torch.randperm(48, generator=generator)[:10] for _ in range(48)])
    plan = BatchPlan(dataset, 12, 1, neighbours, group_size=4, random_share=partial(share, 0.0))
    for number in range(6):
        for group in plan.images(number).reshape(3, 4):
            assert len(set(group)) == 4
            assert set(group[1:]) <= set(neighbours[group[0]].tolist())


def test_with_random_share_one_members_are_any_images(dataset):
    neighbours = torch.zeros(48, 1, dtype=torch.int64)
    plan = BatchPlan(dataset, 12, 1, neighbours, group_size=4, random_share=partial(share, 1.0))
    members = np.concatenate([plan.images(n).reshape(3, 4)[:, 1:].flatten() for n in range(20)])
    assert len(set(members)) > 40


def test_an_unreadable_image_is_replaced_named_and_replaced_alike_on_any_number_of_ranks(dataset, backbone, tmp_path):
    import shutil
    from dataclasses import replace

    shutil.copytree(dataset.root, tmp_path / "data")
    broken = replace(dataset, root=tmp_path / "data")
    plan = BatchPlan(broken, batch_size=8, seed=1)
    victim = int(plan.images(0)[6])
    broken.path(victim).write_bytes(broken.path(victim).read_bytes()[:60])
    whole = TrainingBatches(plan, ImageRows(backbone.preprocess))[0]
    assert len(whole.unreadable) == 1 and broken.image_ids[victim] in whole.unreadable[0]
    assert victim not in whole.images and (torch.from_numpy(plan.images(0)) == whole.images).sum() == 7
    assert broken.caption_image[whole.captions[6]] == whole.images[6]
    second = TrainingBatches(plan, ImageRows(backbone.preprocess), 1, 2)[0]
    assert torch.equal(second.content, whole.content[4:])


def test_a_store_gives_the_features_of_the_images(dataset, backbone, stores):
    plan = BatchPlan(dataset, batch_size=8, seed=1)
    tokens, captions = (TokenStore.open(path) for path in stores)
    stored = TrainingBatches(plan, StoredRows(dataset, tokens, captions))[3].content
    images = TrainingBatches(plan, ImageRows(backbone.preprocess))[3]
    features = backbone.encode_images(images.content)
    torch.testing.assert_close(stored.patch_tokens, features.patch_tokens.half())
    torch.testing.assert_close(stored.image_embeddings, features.embedding)
    raw = [dataset.captions[c] for c in images.captions]
    torch.testing.assert_close(stored.text_embeddings, backbone.encode_texts(raw), atol=1e-6, rtol=1e-6)
