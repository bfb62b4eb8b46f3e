"""Where people look at a running run: TensorBoard, Weights & Biases. Used by rank 0 only."""

from __future__ import annotations

import html
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaegpt.config import LoggingConfig, RunConfig
from megaegpt.config.loading import config_to_dict, config_to_yaml
from megaegpt.errors import ConfigError
from megaegpt.files import write_whole

_RUN_ID = "wandb_id"


class Logger(Protocol):
    """One of them. Steps are counted from 1; names have a slash after their group."""

    def configuration(self, config: RunConfig) -> None:
        """Show what the run is."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of these curves."""

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text, such as a generated sample."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show an image (height, width, 3) of uint8."""

    def flush(self) -> None:
        """Make it readable by others."""

    def close(self) -> None:
        """Write the rest."""


def open_loggers(config: LoggingConfig, done: int) -> list[Logger]:
    """The loggers that the configuration asks for, in a run that starts after ``done`` steps.

    Raises:
        ConfigError: a package is missing, or Weights & Biases refuses the run.
    """
    check_packages(config)
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(Path(config.directory), done))
    if config.wandb != "disabled":
        loggers.append(WeightsAndBiases(config, done))
    return loggers


def check_packages(config: LoggingConfig) -> None:
    """Find out before the run starts whether what it reports to is installed.

    Raises:
        ConfigError: it is not.
    """
    if config.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb={config.wandb} needs the package wandb: pip install wandb, or set "
            "logging.wandb=disabled"
        )


class TensorBoard:
    """Event files under ``tensorboard/``; those of steps after ``done`` are dropped."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def configuration(self, config: RunConfig) -> None:
        self.text(0, "config", config_to_yaml(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        fenced = "\n".join("    " + line for line in text.splitlines())
        self._writer.add_text(name, fenced, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; a resumed run goes on under the id kept in ``wandb_id``.

    Offline, all is kept under ``wandb/`` until ``wandb sync`` sends it.
    """

    def __init__(self, config: LoggingConfig, done: int) -> None:
        import wandb

        folder = Path(config.directory)
        try:
            self._run: Any = wandb.init(
                project=config.wandb_project,
                name=folder.name,
                id=_run_id(folder / _RUN_ID, done),
                resume="allow",
                dir=str(folder),
                mode=config.wandb,
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"logging.wandb={config.wandb}: {reason}; log in by `wandb login`, or set "
                "logging.wandb=offline"
            ) from error
        # Steps of our own: its counter refuses those that a resumed run records again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def configuration(self, config: RunConfig) -> None:
        self._run.config.update(config_to_dict(config), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        page = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": step, name: page})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(pixels)})

    def flush(self) -> None:
        """It sends in the background."""

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, done: int) -> str:
    """The id of the run that is resumed, or a new one for a new run."""
    if done > 0 and path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = secrets.token_hex(4)
    write_whole(path, name.encode())
    return name
