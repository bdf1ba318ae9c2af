"""Which alias a new version gets."""

import pytest

from components.config import GateConfig
from components.score.gate import decide

L1 = GateConfig(metric="l1", budget=64)
PSNR = GateConfig(metric="psnr", budget=64, margin=0.5)


@pytest.mark.parametrize(
    ("gate", "new", "champion", "larger", "alias"),
    [
        (L1, 0.05, 0.06, False, "champion"),
        (L1, 0.06, 0.06, False, "challenger"),  # equal is not better
        (L1, 0.07, 0.06, False, "challenger"),
        (PSNR, 21.0, 20.0, True, "champion"),
        (PSNR, 20.5, 20.0, True, "challenger"),  # exactly the margin is not more than it
        (PSNR, 19.0, 20.0, True, "challenger"),
        (L1, float("nan"), 0.06, False, "challenger"),
    ],
)
def test_direction_and_margin(gate: GateConfig, new: float, champion: float, larger: bool, alias: str) -> None:
    decision = decide(gate, new, champion, larger_is_better=larger)
    assert decision.alias == alias
    assert f"{new:.6g}" in decision.reason and f"{champion:.6g}" in decision.reason
    assert f"{gate.metric}@{gate.budget}" in decision.reason


def test_without_a_gate_it_waits() -> None:
    decision = decide(None, 0.0, 0.0, larger_is_better=False)
    assert decision.alias == "challenger" and "no gate" in decision.reason
