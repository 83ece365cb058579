"""`adagrpo-report`."""

import argparse
import sys
from pathlib import Path

from adagrpo_train.errors import AdaGRPOError

_DESCRIPTION = "Pages about runs and studies: one HTML file each, complete in itself."


def main(arguments: list[str] | None = None) -> int:
    """Draw pages. Returns the exit status: 0 when done, 2 after an error the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        words.insert(0, "draw")
    options = parser.parse_args(words)
    try:
        return options.command(options)
    except AdaGRPOError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of the commands."""
    parser = argparse.ArgumentParser(prog="adagrpo-report", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    study = commands.add_parser("study", help="the page of a study, from its results.json")
    study.add_argument("study_dir", type=Path, metavar="STUDY")
    study.add_argument("--svg", type=Path, metavar="FOLDER", help="also write every chart as an SVG file into a folder")
    study.set_defaults(command=_study)
    return parser, list(commands.choices)


def _study(options: argparse.Namespace) -> int:
    from adagrpo_train.reports.study_page import read_results, write_study_page, write_study_pictures

    results = read_results(options.study_dir)
    sys.stdout.write(f"{write_study_page(results, options.study_dir / 'report.html')}\n")
    for path in write_study_pictures(results, options.svg) if options.svg else ():
        sys.stdout.write(f"{path}\n")
    return 0
