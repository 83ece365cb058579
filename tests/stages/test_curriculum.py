"""Which prompts are chosen, and how the proficiency level moves."""

import pytest
import torch

from adagrpo_train.curriculum.scored import Boundary, Easiest, Hardest, Median, ScoredCurriculum
from adagrpo_train.curriculum.uniform import Uniform
from adagrpo_train.errors import ConfigError

SCORES = torch.tensor([0.0, 3.0, 5.0, 9.0, 13.0])  # mean 6, median 5


def made(kind: type[ScoredCurriculum], chosen: int = 2) -> ScoredCurriculum:
    return kind(candidates=5, chosen=chosen, alpha=0.8, per_rank=False)


@pytest.mark.parametrize(("kind", "rows"), [(Boundary, (2, 1)), (Easiest, (4, 3)), (Hardest, (0, 1)), (Median, (2, 1))])
def test_each_curriculum_chooses_what_its_name_says(kind: type[ScoredCurriculum], rows: tuple[int, ...]) -> None:
    """First call: the level is the mean, 6; nearest to it are 5 (distance 1), then 3 and 9 (tie: the first)."""
    assert made(kind).select(SCORES, 2).rows == rows


def test_the_level_used_for_the_choice_already_contains_this_batch() -> None:
    curriculum = made(Boundary)
    curriculum.select(torch.zeros(5), 2)
    selection = curriculum.select(torch.tensor([0.0, 10.0, 10.0, 10.0, 20.0]), 1)
    assert selection.level is not None
    assert selection.level.mean == pytest.approx(0.8 * 0 + 0.2 * 10)
    assert selection.rows == (0,)  # 0 is nearest to 2; against the old level 0 it would be, too ...
    assert curriculum.select(torch.full((5,), 10.0), 1).level.mean == pytest.approx(0.8 * 2 + 0.2 * 10)  # type: ignore[union-attr]


def test_training_samples_do_not_move_the_level_of_a_scored_curriculum() -> None:
    curriculum = made(Boundary)
    curriculum.select(SCORES, 2)
    level = curriculum.observe(torch.full((8,), 99.0))
    assert level and level.mean == pytest.approx(6.0)


def test_the_level_of_uniform_follows_its_training_samples() -> None:
    curriculum = Uniform(chosen=2, alpha=0.5, per_rank=False)
    assert curriculum.select(None, 2).level is None
    assert curriculum.observe(torch.tensor([])) is None
    curriculum.observe(torch.tensor([1.0, 3.0]))
    level = curriculum.observe(torch.tensor([4.0, 4.0]))
    assert level and level.mean == pytest.approx(3.0)
    assert curriculum.observe(torch.tensor([])) == level  # of a rank without a usable sample


def test_a_restored_curriculum_goes_on_from_its_level() -> None:
    first, second = made(Boundary), made(Boundary)
    first.select(SCORES, 2)
    second.load_state_dict(first.state_dict())
    assert second.select(SCORES * 2, 2) == first.select(SCORES * 2, 2)


@pytest.mark.parametrize(("candidates", "chosen"), [(2, 3), (2, 0)])
def test_choosing_more_than_there_are_or_none_is_refused(candidates: int, chosen: int) -> None:
    with pytest.raises(ConfigError, match=r"1 <= chosen <= candidates"):
        Boundary(candidates=candidates, chosen=chosen, alpha=0.8, per_rank=False)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 2.0])
def test_an_alpha_that_is_no_share_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"curriculum.alpha"):
        Boundary(candidates=2, chosen=1, alpha=alpha, per_rank=False)
