"""Prompt files as an endless, resumable stream."""

import json
from pathlib import Path
from typing import Any

import torch

from adagrpo_train.errors import CheckpointError, ConfigError, PromptError
from adagrpo_train.types import Prompts


def read_prompts(path: Path, *, key: str = "prompts.path") -> Prompts:
    """Read a text file (one prompt per line) or a .jsonl file (objects with "prompt" and, if known, "class").

    Blank lines are skipped; the id of a prompt is its line number, counted from 0.

    Args:
        key: the configuration key that names the file, for messages.

    Raises:
        PromptError: the file is absent, not UTF-8, empty, or a line is not as described.
    """
    if not path.is_file():
        raise PromptError(f"{key}={path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"{key}={path}: not UTF-8 text ({error}); save it as UTF-8") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines) if line.strip()]
    if not numbered:
        raise PromptError(f"{key}={path}: the file holds no prompt; write one per line")
    rows = [(n, *_parse(f"{key}={path}, line {n + 1}", path.suffix, line)) for n, line in numbered]
    ids, texts, classes = zip(*rows, strict=True)
    return Prompts(ids, texts, classes)


def _parse(where: str, suffix: str, line: str) -> tuple[str, str]:
    if suffix != ".jsonl":
        return line, ""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise PromptError(f'{where}: expected an object such as {{"prompt": "a red circle"}}')
    unknown = sorted(set(row) - {"prompt", "class"})
    if unknown:
        raise PromptError(f"{where}: unknown keys {unknown}; the known ones are prompt and class")
    return row["prompt"].strip(), str(row.get("class", ""))


class PromptFile:
    """Every epoch visits the prompts in a new order that depends on (seed, epoch) alone.

    Args:
        path: file read by read_prompts.
        seed: of the orders.

    Raises:
        PromptError: as read_prompts.
    """

    def __init__(self, *, path: str, seed: int) -> None:
        self._prompts, self._seed = read_prompts(Path(path)), seed
        self._epoch, self._position = 0, 0

    def __len__(self) -> int:
        return len(self._prompts)

    def next(self, count: int) -> Prompts:
        """The next `count` distinct prompts. A rest of an epoch too short for them is dropped.

        Raises:
            ConfigError: the file has fewer prompts than that.
        """
        total = len(self._prompts)
        if count > total:
            raise ConfigError(f"curriculum.candidates={count}: prompts.path holds only {total} prompts")
        if self._position + count > total:
            self._epoch, self._position = self._epoch + 1, 0
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch))
        rows = order[self._position : self._position + count].tolist()
        self._position += count
        return self._prompts[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, "prompts": len(self._prompts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["prompts"] != len(self._prompts):
            raise CheckpointError(
                f"the checkpoint was made with {state['prompts']} prompts, prompts.path now holds {len(self._prompts)}"
            )
        self._epoch, self._position = state["epoch"], state["position"]
