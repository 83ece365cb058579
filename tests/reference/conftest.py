"""Turns every recorded case of --golden-dir into one test."""

from pathlib import Path

import pytest
from golden_cases import load_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" not in metafunc.fixturenames:
        return
    folder = Path(str(metafunc.config.getoption("--golden-dir")))
    try:
        cases = load_cases(folder)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    metafunc.parametrize("golden_case", cases, ids=[f"{case.file}::{case.name}" for case in cases])
