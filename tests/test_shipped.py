"""Configurations by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.config.loading import load_config
from megaegpt.errors import ConfigError
from megaegpt.shipped import SHIPPED, find_config

CONFIGS = SHIPPED / "configs"


@pytest.fixture(autouse=True)
def _in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name", ["llama_cpu", "llama_cpu.yaml", "configs/llama_cpu.yaml", Path("llama_cpu")]
)
def test_a_shipped_configuration_is_found_from_any_folder(name: str | Path) -> None:
    assert find_config(name) == CONFIGS / "llama_cpu.yaml"


def test_one_in_a_folder_of_configs_is_found() -> None:
    assert find_config("experiments/smoke") == CONFIGS / "experiments" / "smoke.yaml"


def test_a_file_of_ones_own_comes_first() -> None:
    Path("llama_cpu.yaml").write_text("model: {num_layers: 1}")
    assert find_config("llama_cpu.yaml") == Path("llama_cpu.yaml")


@pytest.mark.parametrize(
    "name", ["none", "../configs/llama_cpu", "/llama_cpu.yaml", "configs", "", "a\0b", "x" * 300]
)
def test_what_is_not_shipped_is_left_to_its_reader(name: str) -> None:
    assert find_config(name) == Path(name)


def test_it_is_loaded_with_what_it_extends() -> None:
    assert load_config("gpt2_124m_gqa").model.num_kv_heads is not None


def test_a_name_that_is_nowhere_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^gpt2_124: no such file; did you mean gpt2_124m or"):
        load_config("gpt2_124")
    with pytest.raises(
        ConfigError, match=r"^a/smoked\.yaml: no .*; did you mean experiments/smoke"
    ):
        load_config("a/smoked.yaml")
    with pytest.raises(ConfigError, match=r"^zzz: no such file; those shipped are in .*/configs$"):
        load_config("zzz")
