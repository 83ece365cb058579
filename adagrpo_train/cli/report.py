"""`adagrpo-report`."""

import argparse
import json
import sys
from pathlib import Path

from adagrpo_train.errors import AdaGRPOError, ConfigError

_DESCRIPTION = "Pages about runs and studies: one HTML file each, complete in itself."


def main(arguments: list[str] | None = None) -> int:
    """Draw pages and compare runs. Returns the exit status: 0 when done or passed, 1 when not, 2 after an error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    if words and words[0] not in (*commands, "-h", "--help"):
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
    draw = commands.add_parser("draw", help="the page of a run; the word may be left out")
    draw.set_defaults(command=_draw)
    compare = commands.add_parser(
        "compare",
        help="hold a run against a reference curve",
        description="Exit status: 0 passed, 1 outside the band, 2 nothing to decide by (no reference recorded, other "
        "settings than the reference has, unfinished).",
    )
    compare.set_defaults(command=_compare)
    for command in (draw, compare):
        command.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")
        command.add_argument(
            "--reference", type=Path, metavar="FILE", help="instead of the one shipped for the run's experiment"
        )
    reference = commands.add_parser(
        "reference",
        help="make a reference curve from finished runs that differ in their seed",
        description="The band is a prediction interval for one more seed, from Student's t, that holds at all points "
        "together, plus --rounding on either side.",
    )
    reference.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="folders of runs, three or more")
    reference.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    reference.add_argument("--confidence", type=float, default=0.95, help="at all points together (default: 0.95)")
    reference.add_argument(
        "--rounding",
        type=float,
        default=0.002,
        help="half-width added for other processors and versions, in reward units (default: 0.002)",
    )
    reference.set_defaults(command=_reference)
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


def _draw(options: argparse.Namespace) -> int:
    from adagrpo_train.reports.run_page import write_report

    _check_run(options.run_dir)
    sys.stdout.write(f"{write_report(options.run_dir, options.reference)}\n")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from adagrpo_train.reports.reference import judge
    from adagrpo_train.reports.rows import read_records

    _check_run(options.run_dir)
    verdict = judge(read_records(options.run_dir), options.reference)
    if verdict.points:
        sys.stdout.write(f"{'iteration':>9}  {'this run':>9}  {'reference':>9}  {'lowest':>9}  {'highest':>9}\n")
    for point in verdict.points:
        value = "-" if point.value is None else f"{point.value:.4f}"
        band = f"{point.mean:>9.4f}  {point.low:>9.4f}  {point.high:>9.4f}"
        sys.stdout.write(f"{point.iteration:>9}  {value:>9}  {band}  {point.side}\n")
    for difference in verdict.differing:
        sys.stdout.write(f"{difference}\n")
    if verdict.reference:
        sys.stdout.write(f"band: {verdict.reference['band']}\n")
    sys.stdout.write(f"{verdict.outcome}: {verdict.text}\n")
    return {"passed": 0, "failed": 1}.get(verdict.outcome, 2)


def _reference(options: argparse.Namespace) -> int:
    from adagrpo_train.reports.reference import make_reference
    from adagrpo_train.runtime.files import write_whole

    for run_dir in options.run_dirs:
        _check_run(run_dir)
    if not 0 < options.confidence < 1 or options.rounding < 0:
        raise ConfigError(
            f"--confidence {options.confidence} must be between 0 and 1, --rounding {options.rounding} at least 0"
        )
    made = make_reference(options.run_dirs, confidence=options.confidence, rounding=options.rounding)
    write_whole(options.out, json.dumps(made, indent=1) + "\n")
    sys.stdout.write(f"{options.out}: {made['experiment']}, {len(made['points'])} points, seeds {made['seeds']}\n")
    return 0


def _check_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such folder")
