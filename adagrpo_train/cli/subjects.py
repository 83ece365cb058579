"""What `adagrpo-eval` is asked to evaluate: the model of the settings, a checkpoint, a pipeline, or files of scores."""

from dataclasses import dataclass, replace
from pathlib import Path

from adagrpo_train import continuation
from adagrpo_train.errors import ConfigError
from adagrpo_train.reports.scored import FACTS, ROWS
from adagrpo_train.runtime.checkpoint import Snapshot
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.settings import Settings

BASE = "base"
"""Names the model of the settings as it is before training."""


@dataclass(frozen=True)
class Subject:
    """What draws the images of an evaluation, or has drawn them.

    Attributes:
        key: the configuration key that names it.
        label: a name for people.
        settings: with the model and the choice of trained weights of this subject.
        snapshot: its weights; None for those of the model.
        scores: folder of an evaluation that has been made; None if images are to be drawn.
    """

    key: str
    label: str
    settings: Settings
    snapshot: Snapshot | None = None
    scores: Path | None = None


def find_subject(settings: Settings, engine: Engine, key: str) -> Subject:
    """What a key names; without a value, the model of the settings.

    Args:
        key: "resume" or "against".

    Raises:
        ConfigError: nothing there can be evaluated, with the remedy.
        CheckpointError: the checkpoint is damaged, or belongs to another configuration.
    """
    value = settings.values[key]
    if value is None or value == BASE:
        return Subject(key, _label(Path(settings.values["model"]["path"])), settings)
    path = Path(value).expanduser().resolve()
    if _is_run(path):
        snapshot = continuation.snapshot_at(value, engine, key=key)
        if key == "resume":
            continuation.check_same_model(settings, snapshot)
            own = settings
        else:
            own = continuation.with_weights_of(settings, snapshot, key=key)
        return Subject(key, f"{_label(_run_of(path))} after {snapshot.iteration} iterations", own, snapshot)
    if (path / "model_index.json").is_file():
        model = settings.values["model"] | {"path": str(path)}
        return Subject(key, _label(path), replace(settings, values=settings.values | {"model": model}))
    folder = path.parent if path.name == ROWS else path
    if (folder / ROWS).is_file():
        return Subject(key, _label(folder), settings, scores=folder)
    raise ConfigError(f"{key}={value}: {_fault(path)}")


def _is_run(path: Path) -> bool:
    inside = path.parent.name == "checkpoints"  # one of them, or the file that names the best
    one = inside or path.name.startswith("iteration_")
    return one or (path / "checkpoints").is_dir() or any(path.glob("iteration_*"))


def _run_of(path: Path) -> Path:
    """The folder of the run that a checkpoint or the folder of checkpoints belongs to."""
    inside = [parent for parent in (path, *path.parents) if parent.name == "checkpoints"]
    return inside[0].parent if inside else path


def _label(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _fault(path: Path) -> str:
    if not path.exists():
        return "no such folder; give a run, a checkpoint, a diffusers pipeline or an evaluation"
    if list(path.glob("*lora*.safetensors")):
        return f"holds adapters without their model; give the run that exported them, such as {path.parent}"
    return f"neither a run, a checkpoint, a diffusers pipeline (model_index.json) nor an evaluation ({ROWS}, {FACTS})"
