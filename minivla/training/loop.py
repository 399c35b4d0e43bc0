"""The training loop.

One function, on `accelerate`: the same code runs in a notebook, and on many devices under
`accelerate launch -m minivla.training …`. Everything random is a function of (seed, step, process), so a
run that was killed and resumed ends, on a CPU, with the same bits as one that was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from minivla.training.batches import STEP, Batches, check_batch, preserved_rng, seed_all, to_device, windowed
from minivla.training.optim import SCHEDULES, make_optimizer, policy_lr_factor, set_lr
from minivla.training.run import Interrupt, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

    from minivla.policies.base import Policy


@dataclass
class TrainResult:
    """What `train` returns; one line when printed.

    policy       the policy given, trained, in evaluation mode (with `ema`: holding the averaged weights)
    step         how many steps are done
    log          the records of log.jsonl
    output       the run's folder, or None
    interrupted  True when Ctrl-C ended the run before its last step
    """

    policy: Any = field(repr=False)
    step: int
    log: list[dict[str, Any]] = field(repr=False)
    output: Path | None = None
    interrupted: bool = False

    def plot(self) -> Any:
        """The loss curve and the success rates, a matplotlib Figure."""
        from minivla.viz import plot_loss

        return plot_loss(self.log)

    def __str__(self) -> str:
        losses = [record["loss"] for record in self.log if "loss" in record]
        parts = [f"{self.step:,} steps" + (" (interrupted)" if self.interrupted else "")]
        parts += [f"loss {losses[0]:.4g} → {losses[-1]:.4g}"] if losses else []
        rates = [record for record in self.log if "success" in record]
        parts += [f"success {r['success']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rates[-1:]]
        return ", ".join(parts) + (f"; in {self.output}" if self.output else "")


@preserved_rng()
def train(
    policy: Policy,
    dataset: Any,
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    lr: float | None = None,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    grad_clip: float | None = 10.0,
    ema: float | None = None,
    mixed_precision: str | None = None,
    eval_env: Any = None,
    eval_every: int = 0,
    eval_episodes: int = 50,
    eval_seed: int = 1_000_000,
    save_every: int = 0,
    keep: int | None = None,
    log_every: int = 50,
    resume: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Train a policy, in place, on a dataset of demonstrations.

    dataset          items as `LeRobotDataset.__getitem__` gives, with the policy's windows
                     (minivla.world's demonstrations get them here)
    steps            optimiser steps in all, a resumed run's earlier ones included
    batch_size       samples a step on each process: two processes give the gradient of one at twice the batch
    seed             decides the order of samples and every random number drawn
    output           folder for log, plot and checkpoints (None: nothing is written)
    lr               the largest group's learning rate, others in proportion (None: the policy's own)
    warmup_steps     steps over which the learning rate rises; a policy with a phase before (VQ-BeT's codes)
                     begins them with the next
    schedule         what follows: "cosine" (to zero) or "constant"; "upstream": all as LeRobot trains it
    grad_clip        largest norm of the gradient (None: not clipped, still logged)
    ema              decay of the averaged weights that are evaluated and saved (None: no average)
    mixed_precision  "bf16", "no", or None: bfloat16 on a GPU that has it
    eval_env         where `evaluate` runs every `eval_every` steps (0: never)
    eval_episodes    how many episodes that is
    eval_seed        the seed of the first of them, far from those of the demonstrations
    save_every       steps between checkpoints (0: only at the end)
    keep             how many checkpoints stay (None: all)
    log_every        steps a log record averages over
    resume           go on from the newest whole checkpoint in `output`, bit for bit on CPU
    num_workers      processes that prepare batches; they change no number
    progress         show a progress bar

    Ctrl-C (or SIGTERM) finishes the step, saves and returns; a second one stops at once. Raises ValueError,
    KeyError or TypeError before the first step for settings or batches that do not fit, and ValueError when
    loss or gradient is no longer finite.
    """
    options = {key: value for key, value in locals().items() if key not in ("policy", "dataset")}
    _check(options)
    accelerator = _accelerator(policy)
    process, processes = accelerator.process_index, accelerator.num_processes
    dataset = windowed(dataset, policy.config)
    batches = Batches(dataset, batch_size, seed, process=process, processes=processes)
    check_batch(policy.preprocess(batches[0]), policy.config)

    optimizer = make_optimizer(policy, lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    run = Run(policy, optimizer, options | {"processes": processes, "frames": len(dataset)}, accelerator)
    device, half = policy.device, _half(policy.device, mixed_precision)
    model, stepper = accelerator.prepare(policy, optimizer, device_placement=[False, False])
    todo = range(run.step, steps)
    loader = batches.loader(todo, num_workers=num_workers, pin_memory=device.type == "cuda")
    plan: Any = {"start": policy.schedule_start, "steps": steps, "warmup_steps": warmup_steps}
    plan["schedule"] = schedule
    policy.train()
    with Interrupt() as interrupt, _bar(run.step, steps, shown=progress and run.main) as bar:
        mark = perf_counter()
        for step, raw in zip(todo, loader, strict=True):
            seed_all(STEP, seed, step, process)
            batch = to_device(policy.preprocess(raw), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss, metrics = model(batch)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(policy.parameters(), grad_clip or math.inf)
            set_lr(optimizer, rates, policy_lr_factor(policy.config, step, **plan))
            stepper.step()
            policy.zero_grad()
            run.stepped({"loss": loss.detach(), **metrics, "grad_norm": norm}, perf_counter() - mark)
            bar.update()
            bar.set_postfix(run.last, refresh=False)
            run.evaluate_if_due(interrupt)
            stop = interrupt.agreed(accelerator)
            run.save_if_due(stop)
            mark = perf_counter()
            if stop:
                break
    run.finish()
    return TrainResult(policy, run.step, run.log.records, run.output, interrupted=run.step < steps)


def _check(options: dict[str, Any]) -> None:
    """Refuse settings that cannot work, naming each and what it may be."""
    least = {"steps": 1, "batch_size": 1, "log_every": 1, "eval_episodes": 1}
    least |= dict.fromkeys(
        ("seed", "warmup_steps", "eval_every", "eval_seed", "save_every", "num_workers"), 0
    )
    for name, smallest in least.items():
        if not _whole(options[name], smallest):
            raise ValueError(f"{name}={options[name]!r}; expected a whole number from {smallest} on")
    if options["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule={options['schedule']!r}; expected one of {', '.join(SCHEDULES)}")
    if options["mixed_precision"] not in (None, "no", "bf16"):
        raise ValueError(f"mixed_precision={options['mixed_precision']!r}; expected 'bf16', 'no' or None")
    expected = {
        "lr": (math.inf, "a learning rate above 0, such as 1e-4, or None for the policy's own"),
        "grad_clip": (None, "the largest norm of the gradient, above 0, or None for no clipping"),
        "ema": (1.0, "a decay between 0 and 1, such as 0.999, or None"),
    }
    for name, (bound, words) in expected.items():
        if options[name] is not None and not _positive(options[name], bound):
            raise ValueError(f"{name}={options[name]!r}; expected {words}")
    if options["keep"] is not None and not _whole(options["keep"], 1):
        raise ValueError(
            f"keep={options['keep']!r}; expected how many checkpoints stay, at least 1, or None for all"
        )
    if options["eval_every"] and options["eval_env"] is None:
        raise ValueError("eval_every is set and eval_env is not; pass the environment to evaluate in")
    if options["output"] is None and (options["resume"] or options["save_every"]):
        raise ValueError("resume and save_every need output=, the folder that holds the checkpoints")


def _whole(value: Any, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _positive(value: Any, bound: float | None) -> bool:
    """Whether a value is a number above 0, and below `bound` if there is one."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value > 0 and (bound is None or value < bound)


def _bar(step: int, steps: int, *, shown: bool) -> tqdm[Any]:
    return tqdm(total=steps, initial=step, desc="training", unit="step", disable=not shown)


def _accelerator(policy: Policy) -> Accelerator:
    """Accelerate's view of the processes: alone, a policy trains where it is; among many, each moves it."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # A policy may leave parameters out of a step (ACT's VAE without latent), which plain DDP would wait for.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[unused])
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "accelerate was set to fp16; minivla trains in bf16 or float32: launch with --mixed_precision no"
        )
    if accelerator.num_processes > 1:
        policy.to(accelerator.device)
    return accelerator


def _half(device: torch.device, mixed_precision: str | None) -> bool:
    if mixed_precision is None:
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return mixed_precision == "bf16"
