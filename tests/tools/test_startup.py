"""Programs answer at once: nothing large is imported before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megaegpt.config import ModelConfig
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "launchers")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)

_RUN_EACH = """
import json, runpy, sys
imported = {}
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (words, end.code)
    imported[words[0]] = [name for name in WATCHED if name in sys.modules]
print(json.dumps(imported))
"""


def _imported(commands: list[list[str]], *watched: str) -> dict[str, list[str]]:
    """Which of the watched packages are imported after each command, all run by one process."""
    code = _RUN_EACH.replace("WATCHED", repr(watched))
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_package_by_itself_imports_no_other() -> None:
    """Neither torch, which takes seconds, nor its own modules until a name is asked for."""
    code = """if True:
        import sys
        import megaegpt
        packages = {name.partition(".")[0] for name in sys.modules}
        print(sorted(packages - sys.stdlib_module_names), "megaegpt.api" in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.stdout.strip() == "['__main__', 'megaegpt'] False", result.stderr


def test_help_needs_neither_torch_nor_deepspeed() -> None:
    assert len(PROGRAMS) > 10
    imported = _imported(
        [[program, "--help"] for program in PROGRAMS],
        "torch", "deepspeed", "transformers", "matplotlib", "pyarrow",
    )  # fmt: skip
    assert imported == {program: [] for program in PROGRAMS}


def test_only_an_engine_needs_deepspeed(tmp_path: Path) -> None:
    """Neither a dry run does, nor what a run reads and checks before it builds one."""
    weights, records = tmp_path / "weights", tmp_path / "records.json"
    grid = ProcessGrid()
    gpt = ModelConfig(max_seq_len=64, hidden_size=4, num_layers=1, num_heads=1)
    save_weights(build_model(gpt, grid), weights, grid)
    records.write_text(json.dumps([{"instruction": "Name a colour.", "output": "Red."}] * 4))
    small = ["model.num_layers=1", "model.hidden_size=64", "model.num_heads=2", "--dry-run"]
    finetune = [
        f"training.initialize_from={weights}",
        f"data.instructions.train={records}",
        "data.instructions.held_out=0.25",
        "training.global_batch_size=1",
        "training.micro_batch_size=1",
        "--dry-run",
    ]
    commands = [
        ["launchers/pretrain.py", "--config", "configs/gpt2_124m.yaml", *small],
        ["launchers/finetune.py", "--config", "configs/finetune_instructions.yaml", *finetune],
    ]
    commands += [["megaegpt/training/pretraining.py"], ["megaegpt/training/finetuning.py"]]
    imported = _imported(commands, "deepspeed", "transformers", "megaegpt.interop")
    weights_are_read = {program: ["megaegpt.interop"] for program, *_ in commands}
    assert imported == {**weights_are_read, "launchers/pretrain.py": []}
