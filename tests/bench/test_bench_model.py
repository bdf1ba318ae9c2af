"""The benchmark itself: its phases add up, its cases run what they name."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from model import SIZES, AlitTokenizer
from tests.bench.bench_model import PHASES, REST, cases, measure, photographs, table


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer() -> AlitTokenizer:
    config = replace(SIZES["demo"], encoder_layers=1, decoder_layers=1, init="paper")
    return AlitTokenizer(config).eval()


def test_phases_add_up_and_early_stops_save(tokenizer):
    options, images = Namespace(dtype="fp32", repeats=1, recompute="none"), photographs(2, 64)
    names = [name for name in cases(tokenizer, images) if "1024" not in name and "2 of" not in name]
    rows = {name: measure(name, options, tokenizer, images) for name in names}
    for row in rows.values():
        assert sum(seconds for seconds, _ in row.phases.values()) == pytest.approx(row.seconds)
        assert sum(operations for _, operations in row.phases.values()) == pytest.approx(row.operations)
        assert set(row.phases) == {*PHASES, REST}
    full, codes = rows["all budgets, all reconstructions"], rows["codes of all budgets"]
    early, never = rows["encode, met at 8 tokens"], rows["encode, never met"]
    assert early.phases["rollouts"][1] < full.phases["rollouts"][1] / 7
    assert early.phases["base decode"][1] == pytest.approx(full.phases["base decode"][1] / 8)
    assert never.phases["base decode"][1] == pytest.approx(full.phases["base decode"][1] * 7 / 8)
    assert codes.phases["decoder"] == codes.phases["base decode"] == (0.0, 0.0)
    assert rows["training step"].phases[REST][1] > rows["training step"].phases["rollouts"][1]
    assert len(table(list(rows.values()), 1e11).splitlines()) == 2 + len(rows)


def test_operations_of_attention_and_products_are_counted(tokenizer):
    """A block of width W on T tokens: 24 T W^2 in products, 4 T^2 W in attention."""
    from tests.bench.bench_model import counting

    block, width, tokens = tokenizer.encoder.blocks[0], tokenizer.config.encoder_width, 73
    with counting() as counter, torch.no_grad():
        block(torch.zeros(1, tokens, width))
    assert counter.get_total_flops() == 24 * tokens * width**2 + 4 * tokens**2 * width
