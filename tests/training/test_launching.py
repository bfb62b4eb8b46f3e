"""How the programs that train start."""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import pytest

from megaegpt.training import launching


def test_garbage_is_collected_while_a_run_trains_and_not_while_it_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collected: dict[str, bool] = {}

    def find_train() -> Any:
        collected["importing"] = gc.isenabled()
        return None

    def start_run(*_: object) -> bool:
        collected["training"] = gc.isenabled()
        return True

    monkeypatch.setattr(launching, "start_run", start_run)
    monkeypatch.setattr(sys, "argv", ["", "--config", "gpt_encoder_cpu"])
    launching.launch(None, time.monotonic(), find_train)
    assert collected == {"importing": False, "training": True}
