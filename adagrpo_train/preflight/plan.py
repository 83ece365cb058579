"""The plan of a run in words: what it does, holds, writes and takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from adagrpo_train.preflight.counts import Counts
from adagrpo_train.preflight.outline import Work
from adagrpo_train.preflight.sizes import Written
from adagrpo_train.preflight.words import duration, number, size, table

TERA = 1e12


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take, of each process. Seconds, and bytes."""

    iteration: float
    evaluation: float  # of the held-out images
    peak: float  # memory
    what: str  # "GPU" or "process": whose memory

    def run(self, counts: Counts) -> float:
        """Seconds of the whole run; writing checkpoints aside."""
        return counts.iterations * self.iteration + counts.held_out_evaluations * self.evaluation


def counted(counts: Counts, rewards: Mapping[str, bool]) -> str:
    """Lines about how much of everything is done.

    Args:
        rewards: name -> whether it trains; the others are asked of held-out images alone.
    """
    many, run = counts.processes, counts.iterations
    images = counts.images * many
    held_out = counts.held_out_images * counts.held_out_evaluations
    kinds = [f"{number(samples * many)} {kind}" for kind, samples in _images(counts).items()]
    network = counts.network
    verbs = {"sampling": "to draw", "training": "to train", "reference": "of the reference"}
    evaluations = [f"{number(network[kind])} {verb}" for kind, verb in verbs.items() if network[kind]]
    asked = ", ".join(f"{number(images)} scores of {name}" for name, trains in rewards.items() if trains)
    rows = {
        "prompts": _prompts(counts),
        "images": f"{number(images)}: {', '.join(kinds)}",
        "reward calls": asked,
        "network": f"{number(sum(network.values()))} evaluations: {', '.join(evaluations)}",
        "updates": f"{counts.updates}",
    }
    whole = {
        "iterations": f"{number(run)}, and {counts.held_out_evaluations} evaluations of "
        f"{number(counts.held_out_images)} held-out images",
        "images": number(images * run + held_out),
        "reward calls": ", ".join(
            f"{number(images * run * trains + held_out)} of {name}" for name, trains in rewards.items()
        ),
        "network": f"{number(sum(network.values()) * run + _held_out_evaluations(counts))} evaluations",
    }
    title = "one iteration" if many == 1 else f"one iteration, {many} processes together"
    return f"{title}\n{table(rows)}the whole run\n{table(whole)}"


def stored(written: Written, *, keep: int) -> str:
    """Lines about files."""
    return "files\n" + table(
        {
            "checkpoint": f"{size(written.checkpoint)}, of which the newest {keep} and the best are kept",
            "export": size(written.export),
            **({"records": f"{size(written.records)}, latents and images"} if written.records else {}),
            "together": f"{size(written.needed(keep))} at most",
        }
    )


def estimated(estimate: Estimate, counts: Counts) -> str:
    """Lines about an estimate from measured pieces."""
    return "estimated from measured pieces\n" + table(
        {
            "memory": f"{size(estimate.peak)} at most of each {estimate.what}",
            "one iteration": duration(estimate.iteration),
            "one evaluation": duration(estimate.evaluation),
            "the whole run": duration(estimate.run(counts)),
        }
    )


def by_shapes(held: Mapping[str, float], work: Work, counts: Counts, *, engine: str, tflops: float | None) -> str:
    """Lines about memory and work as the shapes give them.

    Args:
        held: bytes of each process by what they are for.
        tflops: throughput of a process in 10^12 operations a second; None if it is not known.
    """
    together = sum(held.values())
    memory = {name: size(count) for name, count in held.items()}
    memory["together"] = f"{size(together)} of each process"
    memory["an update"] = (
        f"keeps {size(work.kept)} for its backward pass, {size(work.checkpointed)} with gradient checkpointing"
    )
    memory["at most"] = f"{size(together + work.kept)}, or {size(together + work.checkpointed)}; rewards aside"
    operations = operations_of_iteration(work, counts)
    tera = operations / TERA
    shown = number(tera) if tera > 100 else f"{tera:.3g}"
    rows = {"one iteration": f"{shown} x 10^12 operations of each process; text encoders and rewards aside"}
    if tflops is not None:
        seconds = operations / (tflops * TERA)
        held_out = _operations_of_evaluation(work, counts) / (tflops * TERA)
        rows[f"at {tflops:g} TFLOP/s"] = (
            f"{duration(seconds)} an iteration, {duration(held_out)} an evaluation, "
            f"{duration(Estimate(seconds, held_out, 0, '').run(counts))} the run"
        )
    processes = "1 process" if counts.processes == 1 else f"{counts.processes} processes"
    return f"memory by shapes, engine={engine}, {processes}\n{table(memory)}work by shapes\n{table(rows)}"


def operations_of_iteration(work: Work, counts: Counts) -> float:
    """Floating-point operations of one process in an iteration."""
    forward = counts.trunks * counts.steps + counts.drawn + counts.trained + counts.repeated + counts.compared
    return forward * work.forward + counts.trained * work.backward + counts.images * work.decode


def _operations_of_evaluation(work: Work, counts: Counts) -> float:
    return counts.held_out * (counts.steps * work.forward + work.decode)


def _held_out_evaluations(counts: Counts) -> int:
    """Network evaluations of all held-out evaluations of a run."""
    images = counts.held_out * counts.processes * counts.held_out_evaluations
    return images * counts.steps * counts.evaluations_per_state


def _prompts(counts: Counts) -> str:
    chosen, candidates = (number(each * counts.processes) for each in (counts.chosen, counts.candidates))
    return f"{candidates} candidates, of which {chosen} are trained on" if counts.candidates else chosen


def _images(counts: Counts) -> dict[str, int]:
    both = {"samples": counts.samples, "candidates": counts.candidates}
    return {kind: count for kind, count in both.items() if count}
