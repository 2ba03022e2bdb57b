"""What teacher.py and distill.py share in their training loops: learning rates, seeds, CUDA graphs, CPU
threads."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from support import processes

WARM_UP_CALLS = 3  # of a function before it is captured
PERIOD = 200  # updates between trials of numbers of threads
TRIALS = 5  # updates of each


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then linear decay to zero at `steps`."""
    return peak * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


def schedule(steps: int, peak: float, warmup: int, betas: tuple[float, float] = (0.9, 0.999)) -> Tensor:
    """(steps, 4): each step's learning rate, AdamW's two bias corrections, and its number from 1.

    kernels.project.project_adamw reads a row on the device. There are at least WARM_UP_CALLS rows.
    """
    rows = []
    for step in range(max(steps, WARM_UP_CALLS)):
        t = step + 1
        rows.append([learning_rate(step, steps, peak, warmup), 1 - betas[0] ** t, 1 - betas[1] ** t, t])
    return torch.tensor(rows)


def seed_dropout(cfg: Any) -> None:
    """Let the masks of a job's processes differ. All else that is drawn without a generator must not."""
    if processes.rank() and cfg.dropout:
        torch.manual_seed(cfg.seed + 2**32 * processes.rank())


def captured(f: Callable[[], None], state: list[Tensor], generator: torch.Generator) -> Callable[[], None]:
    """f as a CUDA graph: calling what is returned replays it. Returns f itself where capturing fails.

    f must not wait for the device, and may change nothing but `state` and `generator`. Both are restored
    after the calls that capturing needs.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """
    before = [x.clone() for x in state]
    seed = generator.get_state()
    side_stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    def replay(keep_alive: Callable[[], None] = f) -> None:  # the graph reads f's own tensors where they lie
        graph.replay()

    try:
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP_CALLS):
                f()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            f()
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        print(f"no CUDA graph here ({reason}): updates are launched one by one", flush=True)
        replay = f
    for x, value in zip(state, before, strict=True):
        x.copy_(value)
    generator.set_state(seed)
    return replay


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch has one thread here: for products too small to share, whose threads wait for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Threads:
    """The threads of updates on a CPU: all, half of them or one, whichever is the fastest now.

    PyTorch's threads wait for each other in every operation. Beside another busy process one of them is late
    each time, and one thread alone is two to three times as fast. So each number is tried for a few of every
    PERIOD updates. Used as `with Threads(device) as threads:` around the loop, which calls
    `threads(update, ...)`; afterwards there are as many as before.
    """

    def __init__(self, device: torch.device | str):
        self.most = torch.get_num_threads()
        counts = {self.most}
        if torch.device(device).type == "cpu":
            counts |= {max(1, self.most // 2), 1}
        self.counts = sorted(counts, reverse=True)
        self.seconds: dict[int, list[float]] = {}  # of each number's last trials
        self.n_updates = 0

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_) -> None:
        self._set(self.most)

    def __call__(self, update: Callable[..., None], *args) -> None:
        n_threads = self._trial()
        if n_threads is None:
            self._set(min(self.counts, key=lambda n: statistics.median(self.seconds[n])))
            update(*args)
        else:
            self._set(n_threads)
            if self.n_updates % PERIOD % TRIALS == 0:
                self.seconds[n_threads] = []
            start = time.perf_counter()
            update(*args)
            self.seconds[n_threads].append(time.perf_counter() - start)
        self.n_updates += 1

    @staticmethod
    def _set(n_threads):
        if n_threads != torch.get_num_threads():
            torch.set_num_threads(n_threads)

    def _trial(self) -> int | None:
        """The number of threads that this update tries; None: it is no trial."""
        i = self.n_updates % PERIOD // TRIALS
        return self.counts[i] if i < len(self.counts) else None
