"""The line about the load: when it comes, and what it says."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from jinfer.config import EngineConfig
from jinfer.engine.load_line import EVERY_S, LoadLine
from jinfer.engine.metrics import EngineMetrics, Load


class Clock:
    """An engine whose metrics grow as the test says, and its clock."""

    def __init__(self, **settings: Any) -> None:
        self.now_s = 100.0
        self.counts = EngineMetrics()
        load = Load(num_running=3, num_waiting=5, num_pages_used=1, num_pages=4)
        self.engine: Any = SimpleNamespace(
            has_work=True,
            config=EngineConfig(model="-", **settings),
            metrics=lambda: self.counts.snapshot(load),
        )
        self.line = LoadLine(self.engine, now=lambda: self.now_s)

    def step(self, after_s: float, *, num_prompt: int = 0, num_output: int = 0) -> None:
        self.now_s += after_s
        self.counts.num_prompt_tokens += num_prompt
        self.counts.num_cached_tokens += num_prompt // 4
        self.counts.num_output_tokens += num_output
        self.line.stepped()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "jinfer")
    return caplog


def test_every_ten_seconds_while_requests_run(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    clock.step(0.0)
    for _ in range(24):
        clock.step(EVERY_S / 8, num_prompt=40, num_output=80)
    assert (
        log.messages
        == [
            "3 running, 5 waiting; 32 prompt tokens/s (25% from the prefix cache), "
            "64 output tokens/s; KV cache 25% full"
        ]
        * 3
    )


def test_idle_time_neither_counts_nor_tells(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    clock.step(0.0)
    clock.engine.has_work = False
    clock.step(EVERY_S / 2, num_output=1000)  # the last step of a request
    clock.engine.has_work = True
    clock.step(EVERY_S * 60)  # the first step of the next
    assert not log.messages
    clock.step(EVERY_S / 2, num_output=20)
    clock.step(EVERY_S / 2, num_output=20)
    assert "0 prompt tokens/s, 4 output tokens/s" in log.messages[0]


@pytest.mark.parametrize("settings", [{"disable_log_stats": True}, {"progress": False}])
def test_it_can_be_turned_off(settings: dict[str, bool], log: pytest.LogCaptureFixture) -> None:
    clock = Clock(**settings)
    for _ in range(4):
        clock.step(EVERY_S * 0.9, num_output=10)
    assert not log.messages
