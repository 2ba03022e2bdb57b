"""A run's directory and its command line: what teacher.py, distill.py, data.py and evaluate.py share and no method depends on."""

import csv
import ctypes
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch


class UserError(ValueError):
    """A mistake the user can mend: one line with the value and the remedy, exit code 2."""


def cli(main, config, doc):
    """Run main(config) with options from the command line; a UserError becomes one line and exit code 2."""
    import tyro

    keep_memory()
    try:
        main(tyro.cli(config, description=doc))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def keep_memory():
    """Have malloc keep what is freed: an update frees and takes the same tens of megabytes, and giving them back costs a sixth of it in page faults."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest there is; above it every tensor is mapped anew
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check(cfg, **at_least):
    """Raise UserError where a field of cfg is below its least value, or the device is not there."""
    for name, least in at_least.items():
        value = getattr(cfg, name)
        if not value >= least:  # NaN too
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    try:
        torch.empty(0, device=device(cfg))
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {cfg.device}: not available here ({str(e).splitlines()[0]}); choose cpu, cuda or auto") from None


def device(cfg) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device


def bfloat16(cfg) -> bool:
    """Whether the blocks' matrix products run in bfloat16: as --dtype says; auto: where the device multiplies it natively."""
    if cfg.dtype == "auto":
        if device(cfg) == "cpu":
            flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {"amx_bf16": torch.cpu._is_amx_tile_supported()}
            return any(flags.get(k) for k in ("amx_bf16", "avx512_bf16"))
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cfg.dtype == "bfloat16"


def machine(cfg) -> dict:
    """What a run was made on, without which its figures say little: device, threads, precision, versions, commit ("+": with changes of one's own)."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = torch.cuda.get_device_name() if device(cfg).startswith("cuda") else cpu[1] if cpu else platform.machine()
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {"device": name, "threads": torch.get_num_threads(), "dtype": "bfloat16" if bfloat16(cfg) else "float32", "python": platform.python_version(),
            "torch": torch.__version__, "commit": commit}  # fmt: skip


# ---- files: whole or not at all --------------------------------------------------------------------------------------


def write(path, blob: bytes):
    """Write to a temporary name beside `path`, flush, rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"can't write {path}: {e.strerror}; choose another --out-dir or free the space") from None


def read_json(path):
    """The JSON object in `path`, or None where there is no such file or it is damaged."""
    try:
        x = json.loads(Path(path).read_bytes())
        return x if isinstance(x, dict) else None
    except (OSError, ValueError):
        return None


def write_json(path, x):
    write(path, json.dumps(x, indent=1, default=float).encode())


def start(out_dir, cfg) -> bool:
    """Make out_dir ready for a run with these settings; False where that very run is there already, finished.

    A run is finished once its metrics.json is there, which is written last. One with other settings is never overwritten.
    """
    out_dir, settings = Path(out_dir), dataclasses.asdict(cfg)
    settings = json.loads(json.dumps({k: v for k, v in settings.items() if k != "overwrite"}, default=str))
    if read_json(out_dir / "metrics.json") and not cfg.overwrite:
        old = read_json(out_dir / "config.json") or {}
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
        if not changed:
            return False
        raise UserError(f"{out_dir} holds a finished run with other settings ({', '.join(changed)}); choose another --out-dir or add --overwrite")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "metrics.json").unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"can't write to {out_dir}: {e.strerror}; choose another --out-dir") from None
    write_json(out_dir / "config.json", settings)
    return True


class Log:
    """log.csv, a row at a time; the columns are those of the first row."""

    def __init__(self, path):
        self.file, self.writer = open(path, "w", newline=""), None  # noqa: SIM115 - it lives as long as the run

    def row(self, **values):
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, values)
            self.writer.writeheader()
        self.writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in values.items()})
        self.file.flush()


def read_csv(path) -> dict[str, np.ndarray]:
    """A log.csv as a column of floats each, NaN where a cell is empty."""
    with open(path, newline="") as f:
        head, *rows = csv.reader(f)
    return dict(zip(head, np.array([[float(x or "nan") for x in r] for r in rows]).T, strict=True))


class Clock:
    """Seconds per phase of a run: `with clock("train"): ...`, then clock.seconds."""

    def __init__(self):
        self.seconds = {}

    def __call__(self, phase):
        self.phase, self.start = phase, time.perf_counter()
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.seconds[self.phase] = round(time.perf_counter() - self.start, 2)


# ---- training --------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then linear decay to zero at `steps`."""
    return peak * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


def schedule(steps, peak, warmup, betas=(0.9, 0.999)):
    """(steps, 4): every step's learning rate, AdamW's bias corrections, and number from 1, as kernels.project.project_adamw reads them on the device."""
    return torch.tensor([[learning_rate(t, steps, peak, warmup), 1 - betas[0] ** (t + 1), 1 - betas[1] ** (t + 1), t + 1] for t in range(steps)])


def captured(f, state, generator):
    """f() as a CUDA graph, replayed by calling what is returned. f must not wait for the device, and may change nothing but `state`, tensors
    that are put back after the calls that capturing needs (and the generator).

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """
    before, seed = [x.clone() for x in state], generator.get_state()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                f()
        torch.cuda.current_stream().wait_stream(side)
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            f()
        replay = graph.replay
    except RuntimeError as e:
        print(f"no CUDA graph here ({str(e).splitlines()[0]}): updates are launched one by one", flush=True)
        replay = f
    for x, y in zip(state, before, strict=True):
        x.copy_(y)
    generator.set_state(seed)
    return replay


def table(rows: list[dict]) -> str:
    """Rows of one set of columns as aligned text, numbers to the right."""

    def text(v):
        return v if isinstance(v, str) else "-" if v is None else f"{v:.0f}" if abs(v) >= 100 else f"{v:.3g}"

    cells = [list(rows[0]), *([text(v) for v in r.values()] for r in rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, width, strict=True))) for r in cells)


def line(step, steps, start, text) -> str:
    """The one line of an interval: step, what is measured, rate and remaining time."""
    spent = time.perf_counter() - start
    left = round(spent / step * (steps - step))
    return f"step {step:>{len(str(steps))}}/{steps} | {text} | {step / spent:5.1f} it/s | {left // 60}:{left % 60:02} left"
