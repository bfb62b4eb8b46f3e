"""Whose end is whose: the processes that DeepSpeed's launcher started, and all others."""

from __future__ import annotations

import pytest

from megaegpt.parallel import launcher_watch


@pytest.mark.parametrize(
    ("grandparent", "parent", "watched"),
    [
        ("python /venv/bin/deepspeed --num_gpus 2 train.py", "deepspeed.launcher.launch", True),
        ("python -m deepspeed.launcher.runner train.py", "deepspeed.launcher.launch", True),
        ("bash", "deepspeed.launcher.launch", False),
        ("sshd: user", "deepspeed.launcher.launch", False),
        ("bash deepspeed.sh", "torch.distributed.run", False),
        ("nohup torchrun", "torch.distributed.run", False),
        ("vim /home/me/deepspeed", "bash", False),
    ],
)
def test_only_deepspeeds_own_runner_is_watched(
    monkeypatch: pytest.MonkeyPatch, grandparent: str, parent: str, watched: bool
) -> None:
    """A shell, nohup or tmux may leave at any time."""
    lines = {10: f"python -u -m {parent} train.py", 1: grandparent}
    monkeypatch.setattr(launcher_watch, "parent_of", lambda process: 1)
    monkeypatch.setattr(launcher_watch, "command_line_of", lambda process: lines[process].split())
    assert launcher_watch.deepspeed_runner(10) == (1 if watched else None)
