"""What all contenders of speed.py share: the setting, the stopwatch and the output.

Standard library only: it runs in every peer's interpreter.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Setting:
    """One training set-up. Networks: two hidden layers with tanh, a shared actor and a shared central critic."""

    scenario: str = "navigation"
    num_agents: int = 4
    num_envs: int = 60
    max_steps: int = 100
    epochs: int = 10
    minibatch_size: int = 1000
    width: int = 256  # of the hidden layers
    recurrent: bool = False  # a layer, a GRU and a layer in place of two layers; trained on whole sequences
    lr: float = 5e-5
    gamma: float = 0.9
    lmbda: float = 0.9
    clip_epsilon: float = 0.2
    entropy_coeff: float = 0.01
    max_grad_norm: float = 40.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.frames % self.minibatch_size:  # TorchRL's script rounds the number of minibatches down, BenchMARL up
            raise ValueError(f"minibatch_size {self.minibatch_size} must divide the {self.frames} frames of a batch")

    @property
    def frames(self) -> int:
        return self.num_envs * self.max_steps

    @property
    def minibatches(self) -> int:
        return self.frames // self.minibatch_size


@dataclass
class Timing:
    """Seconds of one iteration; advantages count as update. `cpu` is the process's time on all cores."""

    collection: float
    update: float
    cpu: float


class Stopwatch:
    """Times a training loop from outside: the loop iterates over `watch(collector)` in place of the collector."""

    def __init__(self) -> None:
        self.timings: list[Timing] = []
        self._pause = (0.0, 0.0)

    def watch(self, batches: Iterable) -> Iterator:
        iterator = iter(batches)
        while True:
            start, cpu = time.perf_counter(), time.process_time()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            collected, self._pause = time.perf_counter(), (0.0, 0.0)
            yield batch
            end, cpu_end = time.perf_counter(), time.process_time()
            pause, cpu_pause = self._pause
            self.timings.append(Timing(collected - start, end - collected - pause, cpu_end - cpu - cpu_pause))

    def leave_out(self, function: Callable) -> Callable:
        """Wraps what a training loop does in between and should not count, such as logging."""

        def wrapped(*args, **kwargs):
            start, cpu = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            pause, cpu_pause = self._pause
            self._pause = (pause + time.perf_counter() - start, cpu_pause + time.process_time() - cpu)
            return result

        return wrapped


def main(run: Callable[[int, Setting], list[Timing]], versions: Callable[[], str]) -> None:
    """Runs a contender as speed.py calls it, `CONTENDER.py ITERATIONS SETTING_AS_JSON ...`, and prints its timings."""
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    setting = Setting(**{field.name: options[field.name] for field in fields(Setting) if field.name in options})
    timings = run(int(sys.argv[1]), setting)
    print(
        "TIMINGS " + json.dumps({"versions": versions(), "timings": [vars(timing) for timing in timings]}), flush=True
    )
