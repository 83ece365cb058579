"""Bytes that a run holds and writes, from the shapes of its tensors."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adagrpo_train import build
from adagrpo_train.errors import ConfigError
from adagrpo_train.preflight.counts import Counts

_PROBE = 2**16
"""Weights of the largest tensor that an optimizer is tried on; the state of larger ones is in proportion."""
_FLOAT32 = 4

DIVIDED: dict[str, frozenset[str]] = {
    "single": frozenset(),
    "ddp": frozenset(),
    "zero1": frozenset({"optimizer", "master weights"}),
    "zero2": frozenset({"optimizer", "master weights", "gradients"}),
    "zero3": frozenset({"optimizer", "master weights", "gradients", "weights", "average", "reference"}),
    "fsdp2": frozenset({"optimizer", "gradients", "weights", "average", "reference"}),
}
"""Option of the group `engine` -> of what each process holds a share."""


@dataclass(frozen=True)
class Written:
    """Bytes of files."""

    checkpoint: int
    export: int
    records: int  # latents and images of all of them; what else they hold is small

    def needed(self, keep: int) -> int:
        """What a run needs at its fullest: the newest checkpoints, the best one, one being written, export and
        records."""
        return (keep + 2) * self.checkpoint + self.export + self.records


def written(values: dict[str, Any], model: Any, trained: Sequence[int], counts: Counts) -> Written:
    """Of a run with these settings and flow model. The export of adapters is they alone, else the whole pipeline.

    Args:
        trained: numbers of weights of the trained tensors, whole also where processes hold shares of them.
        counts: of an iteration.
    """
    weights = _FLOAT32 * sum(trained)  # whatever the others are
    average = weights if values["weight_average"]["decay"] else 0
    others = 0 if adapters(model) else nbytes(_beside_the_network(model))
    checkpoint = weights + average + optimizer_bytes(values["optimizer"], trained)
    return Written(checkpoint, weights + others, _recorded(values, model, counts))


def held(
    values: dict[str, Any],
    model: Any,
    trained: Sequence[nn.Parameter],
    *,
    engine: str,
    processes: int,
    text_encoders: bool,
) -> dict[str, float]:
    """Bytes that one process holds throughout training: name -> bytes.

    Args:
        engine: option of the group `engine`.
        text_encoders: whether they stay in memory.

    Raises:
        ConfigError: it is not known what this engine divides.
    """
    if engine not in DIVIDED:
        raise ConfigError(f"engine={engine}: what it divides is not known; choose one of {', '.join(DIVIDED)}")
    count = sum(parameter.numel() for parameter in trained)
    whole: dict[str, float] = {
        "weights": nbytes(model.transformer.parameters()),
        "gradients": nbytes(trained),
        "optimizer": optimizer_bytes(values["optimizer"], [parameter.numel() for parameter in trained]),
        "average": nbytes(trained) if values["weight_average"]["decay"] else 0,
        "reference": nbytes(trained) if _copies_reference(values, model) else 0,
    }
    if "master weights" in DIVIDED[engine] and processes > 1:
        whole["master weights"] = count * _FLOAT32
    if engine == "ddp" and processes > 1:
        whole["gradient buckets"] = nbytes(trained)
    divided = {name: size / processes if name in DIVIDED[engine] else size for name, size in whole.items()}
    divided["VAE"] = nbytes(model.pipeline.vae.parameters())
    if text_encoders:
        divided["text encoders"] = sum(nbytes(encoder.parameters()) for encoder in model.text_encoders())
    return {name: size for name, size in divided.items() if size}


def optimizer_bytes(section: dict[str, Any], sizes: Iterable[int]) -> int:
    """State of an optimizer for tensors of so many weights each, float32; found by trying it on small ones."""
    total = 0.0
    for size, count in Counter(sizes).items():
        tried = min(size, _PROBE)
        parameter = nn.Parameter(torch.zeros(tried))
        parameter.grad = torch.zeros(tried)
        optimizer = build.make(section, "optimizer", params=[parameter])
        optimizer.step()
        state = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
        total += count * state * size / tried
    return round(total)


def adapters(model: Any) -> bool:
    """Whether some weights of the network are not trained."""
    return not all(parameter.requires_grad for parameter in model.transformer.parameters())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors by their shapes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copies_reference(values: dict[str, Any], model: Any) -> bool:
    """Of adapters the reference is the network without them; of every weight it is a copy, if there is a KL."""
    return not adapters(model) and values["algorithm"]["objective"]["kl_weight"] > 0


def _recorded(values: dict[str, Any], model: Any, counts: Counts) -> int:
    """Latents and images of the records of a whole run."""
    record, size = values["record"], values["model"]["resolution"]
    if record["every"] < 1:
        return 0
    samples = counts.samples * counts.processes
    latents = samples * math.prod(model.latent_shape) * model.dtype.itemsize if record["latents"] else 0
    images = counts.images * counts.processes * 3 * size * size if record["images"] else 0
    return counts.iterations // record["every"] * (latents + images)


def _beside_the_network(model: Any) -> list[Tensor]:
    parts = (part for name, part in model.pipeline.components.items() if name != "transformer")
    return [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]
