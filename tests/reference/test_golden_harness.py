"""The comparison itself notices what it must not let pass."""

import json
from pathlib import Path

import pytest
import torch
from golden_cases import GoldenCase, assert_matches, load_cases
from test_golden import test_our_formulas_reproduce_the_recorded_numbers as compare

CASE = GoldenCase("file.json", "name", "source", {}, {}, "", rtol=1e-3, atol=0.0, informational=False)


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        load_cases(tmp_path / "absent")


def test_a_folder_without_cases_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no json file"):
        load_cases(tmp_path)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no case"):
        load_cases(tmp_path)


def test_tensors_are_decoded_in_their_dtype_with_non_finite_values(tmp_path: Path):
    record = {
        "name": "n",
        "source": "s",
        "notes": "",
        "tolerance": {"rtol": 0, "atol": 0},
        "inputs": {"x": {"shape": [2, 1], "dtype": "bfloat16", "data": [1.5, "-inf"]}, "words": ["a"], "none": None},
        "outputs": {"y": "nan"},
    }
    (tmp_path / "file.json").write_text(json.dumps([record]))
    (case,) = load_cases(tmp_path)
    assert torch.equal(case.inputs["x"], torch.tensor([[1.5], [-torch.inf]], dtype=torch.bfloat16))
    assert (case.inputs["words"], case.inputs["none"], case.informational) == (["a"], None, False)
    assert_matches({"y": float("nan")}, case.outputs, case)


@pytest.mark.parametrize("file", ["schedules.json", "unknown.json"])
@pytest.mark.parametrize("informational", [True, False])
def test_a_case_that_nobody_recognises_fails(file: str, informational: bool):
    case = GoldenCase(file, "name", "nobody/nowhere@0 f", {}, {"y": 1}, "", 0.0, 0.0, informational)
    with pytest.raises(pytest.fail.Exception, match="no adapter recognises"):
        compare(case)


@pytest.mark.parametrize(
    "ours",
    [
        {},
        {"a": {"b": [1.0]}},
        {"a": {"b": [1.0, 2.1]}},
        {"a": {"b": [1.0, float("nan")]}},
        {"a": {"b": [1.0, torch.tensor([2.0])]}},
    ],
)
def test_a_number_that_is_missing_or_different_is_noticed(ours: dict):
    expected = {"a": {"b": [1.0, 2.0]}}
    assert_matches({"a": {"b": [1.0, 2.001]}}, expected, CASE)
    with pytest.raises(AssertionError, match="outputs"):
        assert_matches(ours, expected, CASE)


def test_ratios_of_equal_policies_are_compared_exactly():
    assert_matches({"ratio": 1 + 1e-6, "ratio_same_policy": 1.0}, {"ratio": 1.0, "ratio_same_policy": 1.0}, CASE)
    with pytest.raises(AssertionError, match="ratio_same_policy"):
        assert_matches({"ratio_same_policy": 1 + 1e-6}, {"ratio_same_policy": 1.0}, CASE)
