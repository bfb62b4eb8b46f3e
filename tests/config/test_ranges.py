"""Every number of a configuration has a range, and no number outside it is accepted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest

from megaegpt.config import RunConfig
from megaegpt.config.loading import load_config
from megaegpt.config.metadata import leaves, metadata
from megaegpt.config.ranges import Range, range_problems

LEAVES = {dotted: annotation for dotted, annotation, _ in leaves(RunConfig())}
RANGES = {
    dotted: allowed
    for dotted, annotation in LEAVES.items()
    if (allowed := metadata(annotation, Range)) is not None
}


def _is_a(kind: type, annotation: Any) -> bool:
    return annotation is kind or any(_is_a(kind, part) for part in get_args(annotation))


def _with(section: Any, dotted: str, value: Any) -> Any:
    name, _, rest = dotted.partition(".")
    new = _with(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: new})


def _problems(dotted: str, value: Any) -> list[str]:
    if isinstance(getattr(RunConfig().data, dotted.removeprefix("data."), None), tuple):
        value = (1.0, value)
    return [p.message for p in range_problems(_with(RunConfig(), dotted, value))]


def test_every_number_has_a_range() -> None:
    numbers = {name for name, of in LEAVES.items() if _is_a(int, of) or _is_a(float, of)}
    assert numbers == set(RANGES)
    assert len(numbers) > 50


@pytest.mark.parametrize("dotted", RANGES)
def test_a_number_outside_its_range_is_refused_by_name_and_one_inside_is_not(dotted: str) -> None:
    allowed, whole = RANGES[dotted], not _is_a(float, LEAVES[dotted])
    step = 1 if whole else 1e-9
    bad = [allowed.low - step, *([] if allowed.low_included else [allowed.low])]
    good = [allowed.low if allowed.low_included else allowed.low + step]
    if allowed.high < math.inf:
        bad += [allowed.high + step, *([] if allowed.high_included else [allowed.high])]
        good.append(allowed.high if allowed.high_included else allowed.high - step)
    if whole:
        bad.append(10**30)
    else:
        bad += [math.nan, math.inf, -math.inf]
    for value in bad:
        assert [m for m in _problems(dotted, value) if m.startswith(f"{dotted}=")], value
    for value in good:
        assert not _problems(dotted, value), value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generation.temperature=.inf", "generation.temperature must be a number, not inf (it mus"),
        ("generation.temperature=-1", "generation.temperature=-1.0 must not be negative"),
        ("generation.top_k=0", "generation.top_k=0 must be greater than 0"),
        ("generation.top_k=-1", "generation.top_k=-1 must be greater than 0"),
        ("generation.seed=18446744073709551616", "seed=18446744073709551616 must be at most 9223"),
        ("training.seed=-1", "training.seed=-1 must not be negative"),
        ("parallel.tensor_parallel_size=0", "parallel.tensor_parallel_size=0 must be greater than"),
        ("generation.max_new_tokens=99999999999", "must be at most 1000000"),
        ("model.num_layers=1000000000", "model.num_layers=1000000000 must be at most 10000"),
        ("model.dropout=1", "model.dropout=1.0 must be at least 0 and below 1"),
        ("optimizer.lr=1" + "0" * 400, "optimizer.lr must be a number"),
    ],
)
def test_a_number_on_the_command_line_is_one_line(
    override: str, expected: str, tmp_path: Any
) -> None:
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(Exception, match="must") as caught:
        load_config(tmp_path / "run.yaml", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_largest_sizes_are_judged_at_once(tmp_path: Any) -> None:
    (tmp_path / "run.yaml").write_text("")
    sizes = ["model.num_heads=2147483629", "model.hidden_size=2147483629", "model.num_kv_heads=7"]
    ramp = ["training.batch_ramp.start=1", "training.global_batch_size=16777216"]
    with pytest.raises(Exception, match="use one of 1, 2147483629") as caught:
        load_config(tmp_path / "run.yaml", [*sizes, *ramp])
    assert "is never reached" in str(caught.value)
