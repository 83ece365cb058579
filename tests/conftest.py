"""Options and fixtures of the whole test suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# The same examples in every run, on machines of any speed.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# Shapes and types in the signatures of the formulas are checked on every call made by a test.
install_import_hook("adagrpo_train.functional", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declared here, not next to its use: options count only in a conftest that every command line loads."""
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of recorded reference numbers that tests/reference compares with (default: tests/golden)",
    )


@pytest.fixture(autouse=True)
def one_thread_and_fixed_seed() -> None:
    """Small tensors run faster on one thread, and a failing test must fail again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def own_pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pipelines to change, such as by adapters, which others then do not see."""
    from tests import real_sizes  # imports diffusers, which most tests can do without

    real_sizes.pipeline.cache_clear()
    real_sizes.serve(monkeypatch)
    yield
    real_sizes.pipeline.cache_clear()
