"""Batches are divided among optimizer steps alike for any number of processes."""

import pytest

from adagrpo_train.functional.visiting import visits


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_processes_together_visit_in_each_step_what_one_process_would(updates: int) -> None:
    alone = [sorted(step) for step in visits(count=24, first=0, updates=updates, seed=7)]
    for processes in (2, 3, 6 // updates if 6 % updates == 0 else 2):
        share = 24 // processes
        if share % updates:
            continue
        together: list[list[int]] = [[] for _ in range(updates)]
        for rank in range(processes):
            mine = visits(count=share, first=rank * share, updates=updates, seed=7)
            assert {len(step) for step in mine} == {share // updates}  # ranks compute equally much in each step
            for step, rows in enumerate(mine):
                together[step] += [rank * share + row for row in rows]
        assert together == alone


def test_every_batch_is_visited_once_and_no_step_is_empty() -> None:
    for count in range(3, 12):
        steps = visits(count=count, first=0, updates=3, seed=count)
        assert sorted(row for step in steps for row in step) == list(range(count))
        assert all(steps)


def test_the_order_depends_on_the_seed() -> None:
    assert visits(count=30, first=0, updates=3, seed=1) != visits(count=30, first=0, updates=3, seed=2)
