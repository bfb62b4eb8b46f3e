"""Memory maps of many files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_OPEN_ALL = """
import resource, sys
from pathlib import Path
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
from megaegpt.data.tokens.memory_map import map_bytes
maps = [map_bytes(path) for path in sorted(Path(sys.argv[1]).iterdir())]
print(sum(int(content[0]) for content in maps))
"""


def test_more_files_are_mapped_than_a_process_usually_has_open(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03}.bin").write_bytes(bytes([number]))
    command = [sys.executable, "-c", _OPEN_ALL, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said) == sum(range(100))
