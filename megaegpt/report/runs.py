"""The configuration and the records of ``metrics.jsonl`` that a run has left in its folder."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megaegpt.config import RunConfig
from megaegpt.config.deepspeed_keys import dotted_keys
from megaegpt.config.loading import config_to_dict, load_config
from megaegpt.errors import DataError
from megaegpt.json_files import parse_json, read_lines

_BY_CHUNK = "validation_loss_by_chunk"
_OWN_TO_EACH_RUN = ("logging.directory", "checkpoint.directory")


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    name: str
    config: RunConfig
    records: list[dict[str, Any]] = field(repr=False)
    """In the order of their steps; training and validation have records of their own."""

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have ``key``; nan where it was not finite."""
        points = [(r["step"], r[key]) for r in self.records if key in r]
        return [step for step, _ in points], [value for _, value in points]

    def finite(self, key: str) -> list[float]:
        """The values of a curve that are."""
        return [value for value in self.curve(key)[1] if math.isfinite(value)]

    @property
    def steps(self) -> int:
        """Steps on record."""
        return max((record["step"] for record in self.records), default=0)

    def tokens_before(self, step: int) -> int:
        """Tokens predicted in the first ``step`` steps together, padding not counted.

        Steps that are not on record yet are taken to be as in the configuration, and so are runs of
        earlier versions, which have no tokens on record; without a mean of their samples either,
        all count as full ones.
        """
        steps, tokens = self._tokens_seen
        last = bisect.bisect_right(steps, step) - 1
        means = self.finite("tokens_per_sample")
        per_sample = means[-1] if means else self.config.model.sample_len
        batches = self.config.batches
        samples = batches.samples_before(step) - batches.samples_before(steps[last])
        return round(tokens[last] + samples * per_sample)

    @cached_property
    def _tokens_seen(self) -> tuple[list[int], list[float]]:
        """Steps in ascending order, the first of them 0, and the tokens seen up to each."""
        points = zip(*self.curve("tokens_seen"), strict=True)
        known = {0: 0.0} | {step: count for step, count in points if math.isfinite(count)}
        return list(known), list(known.values())

    def last_validation(self) -> dict[str, Any] | None:
        """The record of the latest evaluation, if there was one."""
        return next((r for r in reversed(self.records) if "validation_loss" in r), None)

    def best_validation(self) -> dict[str, Any] | None:
        """The record of the evaluation with the lowest finite loss, if there was one."""
        evaluated = [r for r in self.records if math.isfinite(r.get("validation_loss", math.nan))]
        return min(evaluated, key=lambda r: r["validation_loss"], default=None)


def read_run(folder: Path) -> Run:
    """The run in a folder, the one that its ``logging.directory`` named.

    A last line that is still being written is left out.

    Raises:
        DataError: the folder holds no records of a run, or damaged ones.
        ConfigError: its ``config.yaml`` cannot be read.
    """
    _check_is_run(folder)
    config = load_config(folder / "config.yaml")
    path = folder / "metrics.jsonl"
    try:
        records = [_record(line, where) for line, where in read_lines(path)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: no metrics.jsonl of a run ({reason})") from None
    name = folder.resolve().name.encode(errors="backslashreplace").decode()
    return Run(name, config, records)


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run: give the folder that its logging.directory named")
    if not (folder / "config.yaml").exists():
        raise DataError(
            f"{folder}: this folder is no run's: it has no config.yaml; give the folder that a "
            "run's logging.directory named"
        )


def _record(line: bytes, where: str) -> dict[str, Any]:
    """A record; what was not finite, null or (of earlier versions) NaN in the file, is nan."""
    record = parse_json(line, dict[str, Any], where)
    if type(record.get("step")) is not int:
        raise DataError(f"{where} is damaged: it has no step")
    for name, value in record.items():
        values = value if name == _BY_CHUNK and isinstance(value, list) else [value]
        if not all(_is_value(item) for item in values):
            raise DataError(f"{where} is damaged: {name} is no value of a run")
        finite = [math.nan if v is None or not math.isfinite(v) else v for v in values]
        record[name] = finite if isinstance(value, list) else finite[0]
    return record


def _is_value(value: Any) -> bool:
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs; where folders have the same name, by their paths below what all have in common.

    Raises:
        DataError: as for :func:`read_run`, or a folder is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise DataError(f"{folder} is given twice")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) == len(runs):
        return runs
    common = os.path.commonpath(resolved)
    return [
        dataclasses.replace(run, name=folder.relative_to(common).as_posix())
        for run, folder in zip(runs, resolved, strict=True)
    ]


def config_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted keys whose values are not the same in all runs, with every run's value."""
    flat = [
        {k: v for k, v in dotted_keys(config_to_dict(run.config)) if not isinstance(v, dict)}
        for run in runs
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    shown = {key: [_show(values.get(key)) for values in flat] for key in keys}
    return {
        key: values
        for key, values in shown.items()
        if len(set(values)) > 1 and key not in _OWN_TO_EACH_RUN
    }


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
