"""The YAML files in configs/ are valid, can be started, and explain their keys truthfully."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from megaegpt.config import RunConfig
from megaegpt.config.loading import load_config
from megaegpt.config.metadata import leaves
from megaegpt.config.parsing import annotation_of, describe
from megaegpt.config.presets import create_model_config
from megaegpt.model.build import meta_model
from megaegpt.planning.hardware import find_accelerator
from megaegpt.planning.memory import estimate_memory
from megaegpt.planning.plan import Machines, make_plan, recommend

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LINE = re.compile(r"^(?P<indent> *)(?P<key>[a-z_0-9]+):(?P<value>.*)$")
TYPE_AND_DEFAULT = re.compile(r"^ *# \((?P<type>.*); default (?P<default>.*)\)$")


def names(path: Path) -> str:
    return path.name


def test_there_are_configurations_for_every_model():
    kinds = {load_config(path).model.kind for path in CONFIGS}
    assert kinds == {"gpt", "egpt", "deepgpt"}


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_it_loads_and_fits_one_and_two_processes(path):
    for world_size in (1, 2):
        load_config(path, world_size=world_size)


FOR_SOME_RANKS = re.compile(r"deepspeed --num_(?:gpus|accelerators) (\d+)|at most (\d+) GPUs")


def ranks_of(path: Path) -> list[int]:
    """The numbers of ranks that a file is for: those that it says, or one, a node and two nodes."""
    header = path.read_text(encoding="utf-8").partition("extends:")[0].partition("model:")[0]
    said = FOR_SOME_RANKS.search(header)
    return [int(said[1] or said[2])] if said else [1, 8, 16]


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_it_trains_on_a_node_and_on_two_or_says_on_how_many_gpus(path):
    for world_size in ranks_of(path):
        load_config(path, world_size=world_size)


@pytest.mark.long
@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_it_fits_the_memory_of_the_gpus_that_it_is_for(path):
    config = load_config(path)
    peak = estimate_memory(config, ranks_of(path)[0], "bf16", device_type="cuda").total
    assert peak < 72 * 2**30  # of 80


FOR_GPUS = [path for path in CONFIGS if "cpu" not in path.stem]
some = pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[] if p.stem == "gpt2_124m" else pytest.mark.long, id=p.name)
        for p in FOR_GPUS
    ],
)


@some
def test_its_zero_stage_and_micro_batch_are_those_that_the_plan_recommends(path):
    """On as many H100s as it is for, in nodes of 8."""
    gpus = ranks_of(path)[-1]
    machines = Machines(find_accelerator("h100", 8), gpus, min(gpus, 8))
    replan = functools.partial(make_plan, machines=machines)
    config = load_config(path, world_size=gpus)
    best = recommend(replan(config), replan).config
    assert config.parallel.zero_stage == best.parallel.zero_stage
    assert config.training.micro_batch_size == best.training.micro_batch_size
    assert config.training.global_batch_size == best.training.global_batch_size


@pytest.mark.long
def test_every_one_dry_runs():
    """One process for all: importing the program costs more than running it."""
    program = (
        "import sys, runpy\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = ['launchers/pretrain.py', '--config', path, '--dry-run']\n"
        "    try: runpy.run_path('launchers/pretrain.py', run_name='__main__')\n"
        "    except SystemExit as stop: assert not stop.code, (path, stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, CONFIGS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable parameters") == len(CONFIGS)
    assert "124,475,904 trainable parameters" in done.stdout
    assert "262,144 tokens" in done.stdout


PUBLISHED = {
    "llama-160m": 162_417_408,
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "mistral-7b": 7_241_732_096,
    "llama3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_published_number_of_parameters(name):
    """And its file and its preset are the same model."""
    model = load_config(ROOT / f"configs/{name.replace('-', '_')}.yaml").model
    assert model == create_model_config(name)
    assert meta_model(model).num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_every_key_is_explained_with_its_type_and_default(path):
    sections: list[str] = []
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not (match := LINE.match(line)):
            comments = [*comments, line] if line.lstrip().startswith("#") else []
            continue
        depth = len(match["indent"]) // 2
        sections[depth:] = [match["key"]]
        dotted = ".".join(sections)
        assert comments, f"{dotted} has no comment"
        if dotted == "extends":
            comments = []
            continue
        if match["value"]:
            assert len(comments) >= 2, f"{dotted} says its type but not its meaning"
            stated = TYPE_AND_DEFAULT.match(comments[-1])
            assert stated, f"{dotted}: {comments[-1]!r} does not give type and default"
            assert stated["type"] == describe(annotation_of(RunConfig, dotted)), dotted
            assert same(yaml.safe_load(stated["default"]), default_of(dotted)), dotted
        comments = []


def test_every_key_of_a_configuration_is_explained_in_some_file():
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS]
    given = {dotted for values in files for dotted in keys_of(values)}
    assert {dotted for dotted, *_ in leaves(RunConfig())} <= given


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_no_file_repeats_what_the_file_it_extends_says(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if (base := values.pop("extends", None)) is None:
        return
    old = {dotted: value for dotted, _, value in leaves(load_config(path.parent / base))}
    new = {dotted: value for dotted, _, value in leaves(load_config(path))}
    assert {dotted for dotted in keys_of(values) if dotted in new} == {
        dotted for dotted, value in new.items() if value != old[dotted]
    }


def keys_of(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def default_of(dotted: str) -> object:
    value: object = RunConfig()
    for part in dotted.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def same(stated: object, default: object) -> bool:
    return float(stated) == default if isinstance(default, float) else stated == default  # type: ignore[arg-type]


def test_the_originals_hyper_parameters_are_those_of_the_experiment():
    config = load_config(ROOT / "configs/egpt_war_and_peace.yaml")
    model, optimizer, training = config.model, config.optimizer, config.training
    assert (model.num_layers, model.num_heads, model.hidden_size) == (3, 12, 768)
    assert (model.egpt.num_chunks, model.egpt.chunk_size) == (16, 1024)
    assert (model.dropout, model.bias) == (0.0, False)
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps) == (6e-4, 6e-5, 20)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (training.steps, training.gradient_clipping) == (6000, 1.0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gqa", {"num_kv_heads": 4}),
        ("mla", {"attention": "latent", "latent_dim": 96}),
        ("swa", {"window": 256, "window_every": 4}),
        ("rotary", {"positions": "rotary"}),
    ],
)
def test_families_of_gpt2_differ_from_it_in_attention_or_positions_only(family, changes):
    config = load_config(ROOT / f"configs/gpt2_124m_{family}.yaml")
    plain = load_config(ROOT / "configs/gpt2_124m.yaml")
    assert config.model == create_model_config("gpt2-small (124M)", **changes)
    for section in ("data", "parallel", "training", "optimizer", "generation"):
        assert getattr(config, section) == getattr(plain, section), section
    folders = {path.checkpoint.directory for path in map(load_config, CONFIGS)}
    assert len(folders) == len(CONFIGS)


@pytest.mark.parametrize("suffix", ["", "_cpu"])
def test_egpt_and_its_baseline_differ_in_the_model_only(suffix):
    egpt = load_config(ROOT / f"configs/egpt_war_and_peace{suffix}.yaml")
    deepgpt = load_config(ROOT / f"configs/deepgpt_war_and_peace{suffix}.yaml")
    for section in ("training", "optimizer", "parallel", "generation"):
        assert getattr(egpt, section) == getattr(deepgpt, section)
    assert egpt.model.sample_len == deepgpt.model.sample_len
    for name in get_type_hints(type(egpt.model)):
        if name not in ("kind", "egpt"):
            assert getattr(egpt.model, name) == getattr(deepgpt.model, name), name
    assert (egpt.data.train, egpt.data.validation) == (deepgpt.data.train, deepgpt.data.validation)
    assert egpt.checkpoint.directory != deepgpt.checkpoint.directory
