"""The oracle attends one token at a time, in float64, to the keys that its request has by then."""

import math
import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.engines.attention import attend, can_attend_by_request, plan
from tests.tiny_models import tiny_model

WIDTH = 8


class Cache:
    """As the paged cache does: new keys are written, then all that are asked for are read."""

    def __init__(self, keys: Tensor, values: Tensor, written: Tensor) -> None:
        self.keys, self.values, self.written = keys, values, written  # (places, heads, width)

    def update(self, key: Tensor, value: Tensor, layer: int, arguments: Any) -> tuple[Tensor, Tensor]:
        assert layer == 3
        [read] = arguments["read_index"]
        if not len(read):
            return key, value
        for stored, new in ((self.keys, key), (self.values, value)):
            stored[self.written] = new[0].transpose(0, 1)
        return tuple(stored[read].transpose(0, 1)[None] for stored in (self.keys, self.values))  # type: ignore[return-value]


def one_by_one(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """The last tokens of one request, (tokens, heads, width), over its own (places, heads, width)."""
    rows = []
    for number, token in enumerate(query):
        seen = len(keys) - len(query) + number + 1
        for head, asked in enumerate(token):
            shared = head * keys.shape[1] // token.shape[0]
            scores = [scaling * float(asked.double() @ keys[place, shared].double()) for place in range(seen)]
            peak = max(scores)
            weights = [math.exp(score - peak) for score in scores]
            total = sum(weights)
            parts = [w / total * values[place, shared].double() for place, w in enumerate(weights)]
            rows.append(sum(parts, torch.zeros(WIDTH, dtype=torch.float64)))
    return torch.stack(rows).view(len(query), -1, WIDTH)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "requests",  # of each, how many tokens are new, and how many there are then
    [
        [(1, 5)],
        [(1, 5), (1, 5), (1, 5)],
        [(1, 2), (1, 33), (1, 31), (1, 9), (1, 1)],
        [(4, 4)],
        [(4, 4), (1, 1), (7, 7)],
        [(1, 9), (5, 5), (1, 3), (3, 12), (1, 17), (2, 40)],
        [(3, 12), (1, 70), (1, 6)],
        [(3, 12), (2, 11), (4, 14), (1, 5)],
        [(2, 2), (3, 30), (40, 41), (1, 60), (1, 1), (1, 7)],
        [(3, 3), (3, 3)],
        [(1, 1), (1, 1)],
        [(1, 900), (1, 800), (7, 500), (5, 410), (30, 30)],
        [(1, 120), (1, 100), (1, 90), (1, 700), (1, 800)] * 3,
        [(60, 60), (60, 60), (60, 60)],
        [(60, 60), (40, 52), (33, 64)],
    ],
    ids=str,
)
def test_each_token_attends_to_its_own_request_up_to_itself(
    requests: list[tuple[int, int]], num_heads: int, num_kv_heads: int
) -> None:
    source = torch.Generator().manual_seed(len(requests) * num_heads)
    free = random.Random(0).sample(range(9000), 8000)
    query = torch.randn(sum(new for new, _ in requests), num_heads, WIDTH, generator=source)
    stored_keys = torch.full((9000, num_kv_heads, WIDTH), float("nan"))
    stored_values = stored_keys.clone()
    owned = [(new, [free.pop() for _ in range(total)]) for new, total in requests]
    keys, values = (
        [torch.randn(total, num_kv_heads, WIDTH, generator=source) for _, total in requests] for _ in range(2)
    )
    for number, (new, places) in enumerate(owned):
        stored_keys[places[:-new]] = keys[number][:-new]
        stored_values[places[:-new]] = values[number][:-new]
    has_past = any(new < total for new, total in requests)
    read = [place for _, places in owned for place in places] if has_past else []
    written = torch.tensor([place for new, places in owned for place in places[-new:]])
    made = plan(
        list(accumulate((new for new, _ in requests), initial=0)),
        list(accumulate((total for _, total in requests), initial=0)),
        torch.tensor(read, dtype=torch.int64),
        torch.float32,
    )
    step = {
        "read_index": [made.read],
        "attention_plan": made,
        "cache": Cache(stored_keys, stored_values, written),
    }
    layer = nn.Module()
    layer.layer_idx = 3  # type: ignore[assignment]

    def of_step(each: list[Tensor]) -> Tensor:
        return torch.cat([rows[-new:] for rows, (new, _) in zip(each, requests, strict=True)]).transpose(
            0, 1
        )[None]

    found, weights = attend(
        layer, query.transpose(0, 1)[None], of_step(keys), of_step(values), None, scaling=0.5, **step
    )

    assert weights is None and found.is_contiguous()
    begin = 0
    for number, (new, _) in enumerate(requests):
        expected = one_by_one(query[begin : begin + new], keys[number], values[number], 0.5)
        torch.testing.assert_close(found[0, begin : begin + new].double(), expected, rtol=1e-5, atol=1e-5)
        begin += new


@pytest.mark.parametrize(
    ("family", "settings", "can"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("gpt2", {}, True),
        ("mistral", {"sliding_window": None}, True),
        ("mistral", {"sliding_window": 4}, False),
        ("gemma3_text", {}, False),  # some of its layers slide
        ("gemma2", {}, False),  # transformers takes no SDPA for it: it caps its scores
    ],
)
def test_models_that_attend_to_everything_attend_by_request(
    family: str, settings: dict[str, Any], can: bool
) -> None:
    assert can_attend_by_request(tiny_model(family, **settings)) is can


@pytest.mark.parametrize(
    "asked",
    [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}],
    ids=lambda each: next(iter(each)),
)
def test_what_it_does_not_do_is_refused(asked: dict[str, Any]) -> None:
    tokens = torch.zeros(1, 1, 1, WIDTH)
    made = plan([0, 1], [0, 1], torch.tensor([], dtype=torch.int64), torch.float32)
    with pytest.raises(ValueError, match=f"does not know {next(iter(asked))}"):
        attend(nn.Module(), tokens, tokens, tokens, None, cache=None, attention_plan=made, **asked)


@pytest.mark.parametrize("lengths", [[2000] + [33] * 63, [64] * 64, [1, 500, 2, 480]], ids=len)
def test_padding_at_most_doubles_what_is_read(lengths: list[int]) -> None:
    number = len(lengths)
    ends = list(accumulate(lengths, initial=0))
    made = plan(list(range(number + 1)), ends, torch.arange(ends[-1]), torch.float32)
    assert ends[-1] <= len(made.read) <= 2 * ends[-1]


@pytest.mark.parametrize(
    ("requests", "most"),
    [
        ([(40, 40)] * 8, 1),
        ([(10, 42), (12, 44), (9, 41)], 2),
        ([(512, 2000)] + [(8, 40)] * 20 + [(1, 30)] * 40, 2),
        ([(3, 3), (500, 500), (2, 1800), (1, 1800), (1, 2)], 4),
    ],
    ids=["alike", "of one prefix", "one long", "all different"],
)
def test_padding_costs_little(requests: list[tuple[int, int]], most: int) -> None:
    """In products of tokens and keys, which is what is computed: of two groups, each less than twofold. A few
    thousand are nothing."""
    ends_q, ends_k = (list(accumulate((each[i] for each in requests), initial=0)) for i in (0, 1))
    made = plan(ends_q, ends_k, torch.arange(ends_k[-1]), torch.float32)
    computed = sum(math.prod(group.shape) for group in made.groups)
    assert computed <= 8192 or computed <= most * sum(new * total for new, total in requests)
