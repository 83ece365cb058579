"""Rewards with image towers, on small random weights.

Tests with the fixture `open_clip` need it installed, which the trainer's environment must not have
(`bash scripts/test.sh` runs them last):

    bash scripts/make_reward_env.sh open-clip pytest
    .venvs/open-clip/bin/python -m pytest --confcutdir=tests/vision tests/vision
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_models import write_small_clip

from rewards.vision.torchvision_shim import import_open_clip, mend_torchvision

mend_torchvision()  # before any test module imports transformers


@pytest.fixture(autouse=True)
def one_thread_and_fixed_seed() -> None:
    """As in tests/conftest.py, which a run in another environment leaves out."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not wait for a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def open_clip() -> ModuleType:
    if find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed here; tests/vision/conftest.py says how to run this test")
    return import_open_clip()


@pytest.fixture
def small_clip(open_clip: ModuleType, tmp_path: Path) -> tuple[str, Path]:
    """Path of a small model's config, and a checkpoint for it in the form of HPS-v2's."""
    return write_small_clip(tmp_path, seed=7)


@pytest.fixture
def counted() -> Callable[[Any, str], list[Any]]:
    """Keeps the first argument of every call of a method."""

    def count(target: Any, method: str) -> list[Any]:
        calls: list[Any] = []
        original = getattr(target, method)

        def call(argument: Any) -> Any:
            calls.append(argument)
            return original(argument)

        setattr(target, method, call)
        return calls

    return count
