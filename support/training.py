"""What teacher.py and distill.py share in their training loops: learning-rate schedule and CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # of a function before it is captured


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
