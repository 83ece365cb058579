"""Trains the velocity model and both text encoders on latents with conditional flow matching.

Data parallel over processes started by torchrun::

    torchrun --nproc-per-node 2 -m scripts.tiny.pretrain --out WORK --steps 3600
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from rewards.shapes.grammar import CLASSES, caption, difficulty_class
from scripts.tiny import recipe, recipe_flux
from scripts.tiny.families import FAMILIES

LOGGER = logging.getLogger(__name__)
WARM_UP = 150  # steps
CAPTION_DROPOUT = 0.1

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Average:
    """Exponential moving average of parameters.

    Args:
        parameters: The trained parameters.
        decay: Final decay; the first steps use a shorter average.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the current parameters after step number `step` (from 1)."""
        torch._foreach_lerp_(self.values, self.parameters, 1 - min(self.decay, (1 + step) / (20 + step)))

    @torch.no_grad()
    def save(self, model: torch.nn.Module, path: Path) -> None:
        """Saves the state of `model` with the averaged instead of the current parameters."""
        averaged = {id(parameter): value for parameter, value in zip(self.parameters, self.values, strict=True)}
        state = model.state_dict(keep_vars=True)
        torch.save({name: averaged.get(id(value), value.detach()) for name, value in state.items()}, path)


def learning_rate(step: int, *, steps: int, peak: float, decay_fraction: float) -> float:
    """Returns the learning rate at a step: linear warm-up, constant, linear decay to one hundredth at the end."""
    left = (steps - step) / (decay_fraction * steps) if decay_fraction > 0 else 1.0
    return peak * min(1.0, (step + 1) / WARM_UP) * min(1.0, max(0.01, left))


def make_loss(model: recipe.FlowModel | recipe_flux.FlowModel) -> Loss:
    """Returns the flow-matching loss as a function of latents, token ids, sigma and noise."""

    def loss(latents: torch.Tensor, ids: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1)
        tokens, pooled = model.encode_text(ids)
        velocity = model.velocity((1 - level) * latents + level * noise, sigma, tokens, pooled)
        return (velocity - (noise - latents)).square().mean()

    return loss


def all_reduce_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Averages gradients over all processes in one flat message."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="sd3")
    parser.add_argument("--name", default="flow", help="folder of the checkpoints in the working folder")
    parser.add_argument("--init", type=Path, default=None, help="start from this checkpoint (fresh optimizer)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=96, help="per process")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay-fraction", type=float, default=0.45, help="part of the steps with a falling rate")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument("--emphasise", nargs="*", choices=CLASSES, default=[], help="classes to show more often")
    parser.add_argument("--emphasis", type=float, default=3.0, help="relative frequency of these classes")
    parser.add_argument("--sigma-shift", type=float, default=0.2, help="mean of the logit-normal distribution of sigma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile of the loss")
    return parser.parse_args()


def main() -> None:
    """Trains and writes averaged weights to ``step_XXXXX.pt`` in the folder of the run."""
    args = parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    recipe.setup(seed=args.seed, threads=1)
    family = FAMILIES[args.family]
    latents = torch.load(args.out / "latents.pt", mmap=True)
    scenes = recipe.load_scenes(args.out / "train_scenes.npy")
    all_ids = torch.tensor([family.word_ids(caption(scene)) for scene in scenes])
    frequency = torch.tensor([args.emphasis if difficulty_class(s) in args.emphasise else 1.0 for s in scenes])
    no_caption = torch.tensor(family.word_ids(""))
    model = family.FlowModel()
    if args.init is not None:
        model.load_state_dict(torch.load(args.init))
    parameters = list(model.parameters())
    average = Average(parameters, decay=args.ema)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    loss_function = make_loss(model) if args.no_compile else torch.compile(make_loss(model))
    folder = args.out / args.name
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1000 * (args.seed + 1) + rank)
    total, start = 0.0, time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=args.steps, peak=args.lr, decay_fraction=args.decay_fraction)
        if args.emphasise:
            chosen = torch.multinomial(frequency, args.batch, replacement=True)
        else:
            chosen = torch.randint(len(latents), (args.batch,))
        ids = all_ids[chosen]
        ids[torch.rand(args.batch) < CAPTION_DROPOUT] = no_caption
        sigma = torch.sigmoid(torch.randn(args.batch) + args.sigma_shift)
        data = latents[chosen]
        loss = loss_function(data, ids, sigma, torch.randn_like(data))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        all_reduce_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step + 1)
        total += loss.item()
        if rank == 0 and (step + 1) % 100 == 0:
            elapsed = time.perf_counter() - start
            samples = (step + 1) * args.batch * world
            LOGGER.info("step %d  %d samples  %.0f s  loss %.4f", step + 1, samples, elapsed, total / 100)
            total = 0.0
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            average.save(model, folder / f"step_{step + 1:05d}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
