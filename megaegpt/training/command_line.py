"""The part of the command line that all programs on a run's configuration share."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from megaegpt.arguments import ArgumentParser
from megaegpt.config.loading import load_config
from megaegpt.config.run import RunConfig
from megaegpt.config.suggestions import LIKELY_RUN_KEYS, KeyFinder
from megaegpt.errors import LaunchError, MegaEGPTError
from megaegpt.parallel.launcher_variables import is_launched, started_processes
from megaegpt.training.logging.loggers import check_packages


class RunParser(ArgumentParser):
    """``--config FILE [section.key=value ...]``, started by ``deepspeed``, ``torchrun`` or alone.

    A wrong command line or configuration is reported once, not once a process.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("--config", required=True, metavar="FILE", help="YAML of the run")
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
        self.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="values that differ from it"
        )

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage and exiting."""
        hint = "see --help"
        if option := re.match(r"unrecognized arguments: --([a-z_.-]+)", message):
            finder = KeyFinder(RunConfig, likely=LIKELY_RUN_KEYS)
            key = option[1].replace("-", "_")
            if meant := finder.find(key.rsplit(".", 1)[-1], RunConfig, ""):
                hint = f"a value of the configuration is given as {meant[0]}=VALUE, without dashes"
        raise LaunchError(f"{message} ({hint})")

    def parse_run(self, trains: bool = True) -> tuple[argparse.Namespace, RunConfig]:
        """The arguments, and the configuration they give for this number of processes.

        Args:
            trains: the program takes training steps, whose batch the processes must share evenly.

        Raises:
            LaunchError: a wrong command line, or half of a launcher's variables.
            ConfigError: a wrong configuration, or one that asks for a package that is missing.
        """
        try:
            arguments = self.parse_intermixed_args()
            if not getattr(arguments, "dry_run", False):  # which WORLD_SIZE alone may describe
                is_launched()
            world_size = started_processes() if trains else None
            config = load_config(arguments.config, arguments.overrides, world_size)
            check_packages(config.logging)
        except MegaEGPTError as error:
            error.on_every_rank = True  # all read the same
            raise
        return arguments, config
