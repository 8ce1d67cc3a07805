"""What a run costs, by a clock that the test sets."""

import pytest
import torch
from torch import nn

from rdrop.experiments.training import cost
from rdrop.experiments.training.cost import CostMeter, bytes_of_state


def test_the_share_of_the_time_in_which_updates_wait_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    meter = CostMeter(torch.device("cpu"), seconds_before=100.0)
    for waiting, computing in ((3.0, 1.0), (0.0, 6.0)):
        with meter:
            with meter.waiting_for_data():
                now[0] += waiting
            now[0] += computing
        now[0] += 1000.0  # an evaluation counts for nothing
    report = meter.report(nn.Linear(2, 3))
    assert report["data_wait_share"] == pytest.approx(0.3)
    assert report["train_seconds"] == pytest.approx(110.0)
    assert report["step_milliseconds"] == pytest.approx(5000.0)
    assert report["parameters"] == 9


def test_what_a_resumed_run_has_restored_counts_as_what_another_makes() -> None:
    model = nn.Linear(100, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    assert bytes_of_state(optimizer) == 0
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    assert bytes_of_state(optimizer) == 4 * (2 * 1010 + 2)  # two moments, and a step for each parameter
    meters = [CostMeter(torch.device("cpu"), restored_bytes=size) for size in (0, 10**9)]
    for meter in meters:
        with meter:
            pass
    own, resumed = (meter.report(model)["peak_extra_bytes"] for meter in meters)
    assert own < 10**9 <= resumed


def test_a_session_without_an_update_has_measured_nothing() -> None:
    report = CostMeter(torch.device("cpu")).report(nn.Linear(2, 3))
    assert report["data_wait_share"] is None
    assert report["step_milliseconds"] is None
    assert report["peak_extra_bytes"] is None
