"""Writes what a study has found: data, tables for reading, figures, and a page of them all."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adagrpo_train.experiments.analysis import analyse
from adagrpo_train.experiments.ledger import origins_of
from adagrpo_train.experiments.runner import finished
from adagrpo_train.experiments.study import Run, Study, as_values
from adagrpo_train.reports.rows import read_json
from adagrpo_train.reports.study_page import write_study_page, write_study_pictures
from adagrpo_train.runtime.files import write_whole
from adagrpo_train.tracking.records import read_rows


def write_results(folder: Path, study: Study, runs: list[Run]) -> dict[str, Any]:
    """Write results.json, results.md, report.html and figures/ into the folder of a study.

    All of it is made of the records of the finished runs alone.

    Returns:
        What results.json holds.
    """
    done = [run for run in runs if finished(run.folder)]
    said = analyse(study, done)
    missing = [f"{len(runs) - len(done)} of {len(runs)} runs are not finished"] if len(done) < len(runs) else []
    results = {
        "study": folder.name,
        "question": f"{study.question} {study.published}".strip(),
        "provenance": _provenance(folder, done),
        "findings": missing + said.findings,
        "panels": said.panels,
        "bars": said.bars,
        "tables": said.tables,
        "settings": OmegaConf.to_yaml(OmegaConf.create(dict(as_values(study)))),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    write_whole(folder / "results.md", _markdown(results))
    write_study_page(results, folder / "report.html")
    write_study_pictures(results, folder / "figures")
    return results


def _provenance(folder: Path, done: list[Run]) -> dict[str, Any]:
    """Where the runs come from; several origins stand beside each other.

    A checkout may change while a study goes on, so every run is asked for its commit besides.
    """
    origins = origins_of(folder)
    merged = {key: _joined([str(origin[key]) for origin in origins]) for key in ("date", "machine")}
    own = [str(read_json(run.folder / "environment.json").get("commit", "")) for run in done]
    merged["commit"] = _joined([*(str(origin["commit"]) for origin in origins), *own])
    names = {name for origin in origins for name in origin["versions"]}
    versions = {name: _joined([origin["versions"].get(name, "") for origin in origins]) for name in sorted(names)}
    seconds = sum(
        row.get("time/iteration_seconds") or 0.0 for run in done for row in read_rows(run.folder / "metrics.jsonl")
    )
    return {**merged, "versions": versions, "seconds": seconds, "runs": len(done)}


def _joined(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def _markdown(results: dict[str, Any]) -> str:
    origin = results["provenance"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    parts = [
        f"# {results['study']}\n\n{results['question']}\n",
        "\n".join(f"- {finding}" for finding in results["findings"]) + "\n",
        f"{origin['runs']} runs, {origin['seconds'] / 60:.0f} min of training; {origin['date']}, commit "
        f"{origin['commit']}, {origin['machine']}; {versions}.\n",
    ]
    parts += [_table(table) for table in results["tables"]]
    parts.append(f"## Settings\n\n```yaml\n{results['settings']}```\n")
    return "\n".join(parts)


def _table(table: dict[str, Any]) -> str:
    lines = [_line(table["columns"]), _line(["---"] * len(table["columns"])), *map(_line, table["rows"])]
    return f"## {table['title']}\n\n" + "\n".join(lines) + f"\n\n{table['note']}\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
