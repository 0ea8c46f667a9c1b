"""The one place of limits."""

from pathlib import Path

import pytest

from deepsic_codec import config
from deepsic_codec.errors import LabelIndexError, UnsupportedPayload
from deepsic_codec.payload import limits
from tests.common import check_rejects


def test_memory_is_that_of_the_setting_or_of_the_system(monkeypatch):
    monkeypatch.setattr(limits, "available_memory", lambda: 3 << 30)
    limits.check_memory(3 << 30, "it", UnsupportedPayload)
    check_rejects(UnsupportedPayload, "max_memory", limits.check_memory, (3 << 30) + 1, "it", UnsupportedPayload)
    with config.set(max_memory=1 << 40):
        limits.check_memory(1 << 40, "it", UnsupportedPayload)
    with config.set(max_memory=100):
        check_rejects(UnsupportedPayload, "DEEPSIC_MAX_MEMORY", limits.check_memory, 101, "it", UnsupportedPayload)
    monkeypatch.setattr(limits, "available_memory", lambda: None)  # a system that does not tell
    limits.check_memory(1 << 60, "it", UnsupportedPayload)


def test_small_tasks_do_not_ask_the_system(monkeypatch):
    monkeypatch.setattr(limits, "available_memory", None)
    limits.check_memory(limits.SMALL, "it", UnsupportedPayload)


def test_the_system_tells_its_memory():
    assert limits.available_memory() is None or 0 < limits.available_memory() < 1 << 50


GROUPS = {
    "memory.max memory.current inactive_file": ("", 600),
    "memory.limit_in_bytes memory.usage_in_bytes total_inactive_file": ("memory", 600),
}


@pytest.mark.parametrize("names", GROUPS)
def test_a_container_leaves_less(names, tmp_path, monkeypatch):
    folder, expected = GROUPS[names]
    largest, current, cache = names.split()
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in {largest: "1000\n", current: "500\n", "memory.stat": f"anon 7\n{cache} 100\n"}.items():
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(limits, "Path", lambda text: tmp_path if text == "/sys/fs/cgroup" else Path(text))
    assert limits._of_group() == expected == limits.available_memory()
    (tmp_path / folder / largest).write_text("max\n")
    assert limits._of_group() is None


def test_chunks_are_counted():
    with config.set(max_chunks=5):
        limits.check_count(5, "it", LabelIndexError)
        check_rejects(LabelIndexError, "max_chunks", limits.check_count, 6, "it", LabelIndexError)
