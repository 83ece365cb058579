"""In which optimizer step each network batch of an iteration is trained on."""

import torch


def visits(*, count: int, first: int, updates: int, seed: int) -> list[list[int]]:
    """For each of `updates` optimizer steps the batches that it visits, as rows of this process's batches.

    Every `updates` consecutive batches of the run go one to each step, in an order drawn for them. So all steps are
    as large, each sees every part of the rollout, and where a batch goes does not depend on how many processes share
    the batches out among them.

    Args:
        count: batches of this process, a multiple of `updates` unless it is the only one.
        first: number of its first batch among those of all processes.
        updates: optimizer steps.
        seed: of the order, the same on every process.
    """
    steps: list[list[int]] = [[] for _ in range(updates)]
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, first + count, updates):
        for place, step in enumerate(torch.randperm(updates, generator=generator).tolist()):
            if first <= start + place < first + count:
                steps[step].append(start + place - first)
    return steps
