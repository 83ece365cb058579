"""Reading recorded reference numbers and comparing ours with them. The format is in tests/golden/README.md."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
}
_NON_FINITE = {"nan", "inf", "-inf"}

# Exact by nature, whatever tolerance the rest of the case has.
_EXACT_OUTPUTS = {"ratio_same_policy", "selected_idx", "model_timesteps_int"}


@dataclass(frozen=True)
class GoldenCase:
    """One call of a reference function: decoded inputs and outputs."""

    file: str  # name of its json file
    name: str
    source: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    notes: str
    rtol: float
    atol: float
    informational: bool


def load_cases(folder: Path) -> list[GoldenCase]:
    """Every case of every json file in folder, files in alphabetical order.

    Raises:
        ValueError: folder is missing or holds no json file, or a file holds no case.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"--golden-dir {folder}: no such folder, or no json file in it")
    cases: list[GoldenCase] = []
    for file in files:
        records = json.loads(file.read_text(encoding="utf-8"))
        if not records:
            raise ValueError(f"--golden-dir: {file} holds no case")
        cases.extend(_case(file.name, record) for record in records)
    return cases


def assert_matches(ours: Any, expected: Any, case: GoldenCase, path: str = "outputs") -> None:
    """Every number in expected is in ours, at the same place, of the same shape and within the case's tolerance."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in ours, f"{path}.{key} was recorded but not computed"
            assert_matches(ours[key], value, case, f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(ours) == len(expected), f"{path} has {len(ours)} entries, {len(expected)} were recorded"
        for index, value in enumerate(expected):
            assert_matches(ours[index], value, case, f"{path}.{index}")
    elif isinstance(expected, (Tensor, int, float)):
        exact = bool(_EXACT_OUTPUTS.intersection(path.split(".")))
        torch.testing.assert_close(
            torch.as_tensor(ours).detach().double(),
            torch.as_tensor(expected).double(),
            rtol=0.0 if exact else case.rtol,
            atol=0.0 if exact else case.atol,
            equal_nan=True,
            msg=lambda message: f"{path}: {message}",
        )
    else:
        assert ours == expected, f"{path} is {ours!r}, {expected!r} was recorded"


def _case(file: str, record: dict[str, Any]) -> GoldenCase:
    assert record["outputs"], f"{file}::{record['name']} records no output"
    return GoldenCase(
        file=file,
        name=record["name"],
        source=record["source"],
        inputs=_decoded(record["inputs"]),
        outputs=_decoded(record["outputs"]),
        notes=record["notes"],
        rtol=float(record["tolerance"]["rtol"]),
        atol=float(record["tolerance"]["atol"]),
        informational=bool(record.get("informational", False)),
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"shape", "dtype", "data"}:
            numbers = [float(number) if isinstance(number, str) else number for number in value["data"]]
            return torch.tensor(numbers, dtype=torch.float64).to(_DTYPES[value["dtype"]]).reshape(value["shape"])
        return {key: _decoded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value
