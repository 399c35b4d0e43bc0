"""A training run around its steps: what is logged, evaluated, saved and resumed, and how it is stopped."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch

from minivla.training import checkpoint
from minivla.training.checkpoint import TIMES, Log
from minivla.training.evaluation import evaluate
from minivla.training.optim import Average

if TYPE_CHECKING:
    from accelerate import Accelerator

# The settings that decide the numbers of a run; a resumed run is told when they differ.
DECISIVE = (
    "steps", "batch_size", "seed", "lr", "warmup_steps", "schedule", "grad_clip", "ema", "mixed_precision",
    "log_every", "processes", "frames",
)  # fmt: skip


class Run:
    """One training run: `step` counts the finished steps, `last` holds numbers for the progress bar."""

    def __init__(
        self, policy: Any, optimizer: torch.optim.Optimizer, options: dict[str, Any], accelerator: Accelerator
    ) -> None:
        self.policy, self.optimizer, self.options, self.accelerator = policy, optimizer, options, accelerator
        self.main: bool = accelerator.is_main_process
        self.output = Path(options["output"]) if options["output"] is not None else None
        self.log = Log(self.output / "log.jsonl" if self.output and self.main else None)
        self.average = Average(policy, options["ema"]) if options["ema"] else None
        self.step, self.seconds = 0, 0.0
        self.window: list[dict[str, Any]] = []  # the steps since the last log record
        self.window_seconds = 0.0
        self.last: dict[str, Any] = {}
        self.plotted = -math.inf
        if options["resume"]:
            self._resume()
        elif self.main:
            self._expect_fresh()
        if self.main and self.output and (unusual := policy.config.unusual()):
            warnings.warn(
                f"the checkpoints in {self.output} will use fields only minivla knows "
                f"({', '.join(unusual)}): LeRobot will refuse them",
                stacklevel=4,
            )

    def _expect_fresh(self) -> None:
        if self.output and ((self.output / "log.jsonl").exists() or checkpoint.checkpoints(self.output)):
            raise ValueError(
                f"{self.output} holds a training run; pass resume=True to go on with it, or another folder"
            )

    def _resume(self) -> None:
        assert self.output is not None
        state = checkpoint.newest_state(self.output)
        if state is None:
            warnings.warn(f"no whole checkpoint in {self.output}: starting at step 0", stacklevel=4)
        else:
            self._load(state)
        self.accelerator.wait_for_everyone()
        if self.main:
            checkpoint.sweep(self.output)
            self.log.rewind(self.step)

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name, buffer in self._counters():
                buffer.copy_(state["counters"][name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.output} was trained with another policy than this {type(self.policy).__name__}; "
                f"build it with the same config. {error}"
            ) from error
        if self.options["ema"]:
            self.average = Average(self.policy, self.options["ema"])
            self.average.load(state["average"] or self.average.weights)
        self.step, self.window = state["step"], state["window"]
        self.seconds, self.window_seconds = state[TIMES]["seconds"], state[TIMES]["window_seconds"]
        changed = [
            f"{k} {state['settings'][k]} → {self.options[k]}"
            for k in DECISIVE
            if state["settings"][k] != self.options[k]
        ]
        if changed:
            warnings.warn(
                f"resumed at step {self.step:,} with other settings ({', '.join(changed)}): "
                "the run goes on, but not as the one that was stopped would have",
                stacklevel=5,
            )

    def stepped(self, numbers: dict[str, Any], seconds: float) -> None:
        """Count a finished step: `numbers` are its loss, metrics and gradient norm. Logs when it is time.

        Raises ValueError when they are not finite (noticed when they are logged, so that a GPU is not made
        to wait).
        """
        self.step += 1
        self.window.append(numbers)
        self.window_seconds += seconds
        if self.average:
            self.average.update(self.policy, self.step)
        if self._due("log_every") or self.step == self.options["steps"]:
            self._write_record()

    def _due(self, option: str) -> bool:
        every = self.options[option]
        return bool(every) and self.step % every == 0

    def _write_record(self) -> None:
        self._settle()
        # A second phase may have other metrics: each is averaged over the steps that have it.
        keys = list(dict.fromkeys(key for numbers in self.window for key in numbers))
        columns = [[numbers[key] for numbers in self.window if key in numbers] for key in keys]
        means = [sum(column) / len(column) for column in columns]
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(torch.tensor(means, device=self.policy.device), "mean").tolist()
        record = {"step": self.step, **dict(zip(keys, means, strict=True))}
        record["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        self.seconds += self.window_seconds
        speed = len(self.window) / max(self.window_seconds, 1e-9)
        self.log.write(record | {TIMES: {"steps_per_s": round(speed, 3), "seconds": round(self.seconds, 3)}})
        self.last = self.last | {"loss": f"{record['loss']:.4g}"}
        self.window, self.window_seconds = [], 0.0

    def _settle(self) -> None:
        """Turn the window's tensors into floats, which waits for the device, and check them."""
        self.window = [{key: float(value) for key, value in numbers.items()} for numbers in self.window]
        for step, numbers in enumerate(self.window, self.step - len(self.window) + 1):
            if odd := [f"{key} is {value}" for key, value in numbers.items() if not math.isfinite(value)]:
                raise ValueError(
                    f"at step {step}, {' and '.join(odd)}; nothing was saved since. Lower lr, lengthen "
                    "warmup_steps, set grad_clip, or look for statistics with a tiny spread"
                )

    def _published(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy has the weights that are evaluated and saved."""
        return self.average.applied(self.policy) if self.average else contextlib.nullcontext()

    def evaluate_if_due(self, interrupt: Interrupt) -> None:
        """Evaluate every `eval_every` steps, on the main process. Ctrl-C ends it, and then the run."""
        if self._due("eval_every") and self.main:
            with interrupt.at_once(), self._published():
                self._evaluate()
        if self._due("eval_every"):
            self.accelerator.wait_for_everyone()

    def _evaluate(self) -> None:
        options = self.options
        result = evaluate(
            self.policy,
            options["eval_env"],
            options["eval_episodes"],
            options["eval_seed"],
            progress=options["progress"],
        )
        logged = ("success", "low", "high", "episodes", "clipped", "max_reward")
        numbers = {key: getattr(result, key) for key in logged}
        self.log.write({"step": self.step, **numbers})
        self.last = self.last | {"success": f"{result.success:.3f}"}

    def save_if_due(self, stop: bool) -> None:
        """Write a checkpoint every `save_every` steps, at the last one, and when the run is being stopped."""
        if self.output is None or not (stop or self._due("save_every") or self.step == self.options["steps"]):
            return
        self._settle()
        if self.main:
            checkpoint.save_checkpoint(self.output, self.policy, self._state(), weights=self._published())
            checkpoint.prune(self.output, self.options["keep"])
            self._plot(final=stop or self.step == self.options["steps"])
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "policy": self.policy.state_dict(),
            "counters": {name: buffer.clone() for name, buffer in self._counters()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights if self.average else None,
            "window": self.window,
            "settings": {key: self.options[key] for key in DECISIVE},
            TIMES: {"seconds": self.seconds, "window_seconds": self.window_seconds},
        }

    def _counters(self) -> list[tuple[str, torch.Tensor]]:
        """Buffers that no checkpoint holds and a run must not lose, such as where VQ-BeT's phase 1 stands."""
        stored = self.policy.state_dict()
        return [(name, buffer) for name, buffer in self.policy.named_buffers() if name not in stored]

    def _plot(self, final: bool) -> None:
        """Draw the log at the end of the run, and before at most once a minute, since drawing takes time."""
        if self.output and self.log.records and (final or perf_counter() - self.plotted > 60):
            from matplotlib import pyplot

            from minivla.viz import plot_loss

            figure = plot_loss(self.log.records)
            figure.savefig(self.output / "loss.png", dpi=150)
            pyplot.close(figure)
            self.plotted = perf_counter()

    def finish(self) -> None:
        """Leave the policy ready to act, with the published weights."""
        if self.average:
            self.average.copy_to(self.policy)
        self.policy.eval()
        self.policy.reset()


class Interrupt:
    """Ctrl-C or SIGTERM inside the block sets `asked`; a second one raises KeyboardInterrupt, as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere python takes no handlers
            signals = (signal.SIGINT, signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self._immediate:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Ctrl-C ends this block right away, quietly, and counts as asked: for long work between steps."""
        self._immediate = True
        try:
            yield
        except KeyboardInterrupt:
            self.asked = True
        finally:
            self._immediate = False

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all get the same answer, so none waits for another."""
        if accelerator.num_processes == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum") > 0)
