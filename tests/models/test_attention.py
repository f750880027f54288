"""Both forms of attention against each other and against one plain softmax a sequence."""

from functools import partial

import pytest
import torch

from models.encoder.attention import AttentionAtOnce, AttentionByLength
from models.encoder.packing import Group

GROUPS = (Group(0, 2, 3), Group(6, 1, 5), Group(11, 3, 16), Group(59, 1, 19))
ROWS, HEADS, WIDTH = 78, 4, 32
CPU = torch.device("cpu")


def plain(queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
    """A softmax for each sequence and head."""
    contexts = []
    for start, count, length in GROUPS:
        for first in range(start, start + count * length, length):
            rows = slice(first, first + length)
            for head in range(HEADS):
                columns = slice(head * 8, head * 8 + 8)
                key, value = keys_values[rows].chunk(2, dim=1)
                weights = torch.softmax(queries[rows, columns] @ key[:, columns].T / 8**0.5, dim=1)
                contexts.append(weights @ value[:, columns])
    by_sequence = [torch.cat(contexts[i : i + HEADS], dim=1) for i in range(0, len(contexts), HEADS)]
    return torch.cat(by_sequence)


def inputs(device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(ROWS, n * WIDTH, device=device, requires_grad=True) for n in (1, 2))


def first_rows() -> torch.Tensor:
    return torch.cat([torch.arange(g.start, g.rows.stop, g.length) for g in GROUPS])


@pytest.mark.parametrize("form", [AttentionByLength, partial(AttentionAtOnce, device=CPU)])
def test_it_is_a_softmax_over_each_sequence_with_its_gradients(form):
    queries, keys_values = inputs()
    target = torch.randn(ROWS, WIDTH)
    expected = plain(queries, keys_values)
    expected_gradients = torch.autograd.grad((expected * target).sum(), (queries, keys_values))
    actual = form(GROUPS, HEADS, 0.0)(queries, keys_values)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad((actual * target).sum(), (queries, keys_values))
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [AttentionByLength, partial(AttentionAtOnce, device=CPU)])
def test_one_query_a_sequence_is_that_row_of_the_whole(form):
    queries, keys_values = inputs()
    with torch.no_grad():
        attention = form(GROUPS, HEADS, 0.0)
        whole = attention(queries, keys_values)
        single = attention(queries[first_rows()], keys_values, one_query=True)
    torch.testing.assert_close(single, whole[first_rows()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [AttentionByLength, partial(AttentionAtOnce, device=CPU)])
def test_dropout_takes_weights_and_keeps_their_mean(form):
    queries, keys_values = inputs()
    attention = form(GROUPS, HEADS, 0.5)
    draws = torch.stack([attention(queries, keys_values).detach() for _ in range(600)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), plain(queries, keys_values).detach(), rtol=0, atol=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("one_query", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_gpu_gives_what_the_plain_softmax_gives(dtype, bound, one_query):
    device = torch.device("cuda")
    queries, keys_values = inputs(device)
    expected = plain(queries, keys_values)
    target = torch.randn(ROWS, WIDTH, device=device)
    if one_query:
        expected, target = expected[first_rows()], target[first_rows()]
    expected_gradients = torch.autograd.grad((expected * target).sum(), (queries, keys_values))
    chosen = queries[first_rows()] if one_query else queries
    actual = AttentionAtOnce(GROUPS, HEADS, 0.0, device)(chosen.to(dtype), keys_values.to(dtype), one_query)
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=bound)
    gradients = torch.autograd.grad((actual.float() * target).sum(), (queries, keys_values))
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=2 * bound)
