"""Turn the records of runs into one HTML file: tables, curves, loss by chunk, differences.

    python tools/report.py runs/deepgpt runs/egpt --output report.html

A run is the folder named by its logging.directory, finished or not. The file needs no other file
and no network. Figures are drawn by matplotlib (the extra `plots`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megaegpt.arguments import ArgumentParser, path
from megaegpt.errors import LaunchError, exits_cleanly
from megaegpt.files import is_special, is_standard_output, write_whole
from megaegpt.report.figures import can_draw
from megaegpt.report.page import render
from megaegpt.report.runs import read_runs

_ENDINGS = ("", ".html", ".htm", ".xhtml")


@exits_cleanly
def main() -> None:
    """Write the page."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html; - prints it",
    )
    arguments = parser.parse_args()
    if not can_draw():
        raise LaunchError("figures need the package matplotlib: pip install matplotlib")
    output: Path = arguments.output
    printed = is_standard_output(output)
    if not printed and not is_special(output) and output.suffix.lower() not in _ENDINGS:
        raise LaunchError(f"--output {output}: the page is HTML, its name must end in .html")
    page = render(read_runs(arguments.runs))
    if printed:
        sys.stdout.write(page)
        return
    write_whole(output, page.encode())
    print(f"{output}: {len(arguments.runs)} run(s), {len(page) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
