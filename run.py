"""A run's directory and its command line: what teacher.py, distill.py, data.py and evaluate.py share and no method depends on."""

import atexit
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import hashlib
import importlib.util
import inspect
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake the user can mend: one line with the value and the remedy, exit code 2."""


def cli(main, config, doc):
    """Run main(config) with options from the command line; a UserError becomes one line and exit code 2."""
    keep_memory()
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, _stop)
    with contextlib.ExitStack() as stack:
        if rank():  # one process of a job speaks for all; another tells its own errors
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        with contextlib.redirect_stderr(silence if rank() else sys.stderr):
            cfg = parsed(config, doc)
        try:
            main(cfg)
            sys.stdout.flush()
            code = 0
        except BrokenPipeError:  # whoever read, `| head` for one, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141  # as a shell tells SIGPIPE
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            code = 2
        except (RuntimeError, MemoryError) as e:
            if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(e):
                raise
            print(f"error: out of memory ({(str(e).splitlines() or [''])[0][:150]}); try a smaller --batch-size, or --data-device host", file=sys.stderr)
            code = 2
        except Stopped as e:
            print(e, file=sys.stderr if not rank() else sys.stdout)
            code = 128 + e.signum
        if dist.is_initialized() and code:  # with the others gone, the end of a process group would wait for them or abort
            sys.stdout.flush()
            os._exit(code)
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        sys.exit(code)


def parsed(config, doc):
    """A dataclass from the command line. Its fields' comments are their --help; lines of comment alone are headings, under which --help groups them."""
    import tyro

    fields, types = {f.name: f for f in dataclasses.fields(config)}, typing.get_type_hints(config, include_extras=True)
    groups = []  # (heading, [field])
    for line in inspect.getsource(config).splitlines():
        if m := re.fullmatch(r"    # (\w+)", line):
            groups.append((m[1], []))
        elif groups and (m := re.match(r"    (\w+): [^#]*(?:  # (.*))?$", line)) and m[1] in fields:
            option = typing.Annotated[types[m[1]], tyro.conf.arg(help=m[2])]
            groups[-1][1].append((m[1], option, dataclasses.field(default=fields[m[1]].default)))
    if not groups:
        return tyro.cli(config, description=doc)
    groups = [(h, dataclasses.make_dataclass(h, options, namespace={"__doc__": " "})) for h, options in groups]
    given = tyro.cli(dataclasses.make_dataclass("Options", [(h, g, dataclasses.field(default_factory=g)) for h, g in groups]), description=doc,
                     config=(tyro.conf.OmitArgPrefixes,))  # fmt: skip
    return config(**{k: v for h, _ in groups for k, v in vars(getattr(given, h)).items()})


class Stopped(BaseException):
    """SIGTERM or SIGINT; exit code 143 or 130."""

    def __init__(self, signum, text="stopped"):
        super().__init__(f"{text} ({signal.Signals(signum).name})")
        self.signum = signum


_holding, _asked = False, None  # whether a signal must wait for the end of an update; the one that does


def _stop(signum, _):
    global _asked
    if not _holding or (_asked is not None and world() == 1):  # torchrun sends its own after the terminal's
        raise Stopped(signum)
    _asked = _asked or signum


def keep_memory():
    """Have malloc keep what is freed: an update frees and takes the same tens of megabytes, and giving them back costs a sixth of it in page faults."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest there is; above it every tensor is mapped anew
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check(cfg, **at_least):
    """Raise UserError where a field of cfg, or one of its numbers, is below its least value, or the device or a package is not there."""
    for name, least in at_least.items():
        value = getattr(cfg, name)
        for x in value if isinstance(value, tuple) else (value,):
            if not x >= least:  # NaN too
                raise UserError(f"--{name.replace('_', '-')} {x}: must be at least {least}")
    for package in ("tensorboard", "wandb"):
        if getattr(cfg, package, False) and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs a package that is not here: pip install {package}")
    if not hasattr(cfg, "device"):
        return
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise UserError(f"--device {cfg.device}: choose cpu, cuda, cuda:<number> or auto")
    try:
        torch.empty(0, device=device(cfg))
        if device(cfg).startswith("cuda:"):
            torch.cuda.set_device(device(cfg))  # kernels and captured graphs run on the current one
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


# ---- several processes: torchrun -------------------------------------------------------------------------------------

JOB_TIMEOUT = datetime.timedelta(hours=12)  # as long may one process collect or download while the others wait; a dead one is noticed at once
_others_asked = None  # (1,), on the device: how many processes a signal has asked to end, as of the last `summed`


def rank() -> int:
    """This process's number in torchrun's job, 0 without one. Rank 0 alone prints, writes and evaluates."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes the job has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(cfg):
    """Meet the job's other processes (PyTorch distributed: nccl for GPUs, gloo for CPUs), each on a GPU of its own."""
    if world() == 1 or dist.is_initialized():
        return
    gpu, local = device(cfg).startswith("cuda"), int(os.environ.get("LOCAL_RANK", 0))
    if ":" in device(cfg):
        raise UserError(f"--device {cfg.device} names one GPU for {world()} processes; with torchrun say --device cuda, and CUDA_VISIBLE_DEVICES to choose")
    if gpu and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes or more for {torch.cuda.device_count()} GPUs; use torchrun --nproc_per_node={torch.cuda.device_count()}, or --device cpu")
    if gpu:
        torch.cuda.set_device(local)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    threading.Thread(target=_end_at_last, args=(read,), daemon=True).start()
    with together():
        store, r, n = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # torchrun keeps it over restarts, with the dead ones' addresses
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=r, world_size=n, timeout=JOB_TIMEOUT)


def _end_at_last(signals, seconds=10):
    """A process that waits for one that is gone runs no Python, so no handler of a signal: so long after one, it is ended from here."""
    os.read(signals, 1)
    time.sleep(seconds)
    os.write(2, b"error: asked to end, but waiting for another process of this job; --resume goes on from the last checkpoint\n")
    os._exit(143)


@contextlib.contextmanager
def together():
    """UserError where the others can't be reached."""
    try:
        yield
    except RuntimeError as e:
        raise UserError(f"another process of this job ended or can't be reached ({str(e).splitlines()[0][:150]}); "
                        f"the same command with --resume goes on from the last checkpoint") from None  # fmt: skip


def meet():
    """Wait until every process of the job is here."""
    if world() > 1:
        with together():
            dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def first():
    """`with run.first(): ...`: rank 0 goes through it before the others, who find what it made: a dataset, its cache."""
    if rank():
        meet()
    yield
    if not rank():
        meet()


def told(x: int) -> int:
    """Rank 0's x."""
    if world() == 1:
        return x
    x = torch.tensor([int(x)])  # of every process, whatever type its own has
    with together():
        dist.broadcast(x, 0)
    return int(x)


def add_up(x):
    """x, in place, becomes its sum over the job's processes: one call."""
    if world() > 1:
        with together():
            dist.all_reduce(x)


def summed(*xs):
    """Each of xs as its sum over the job's processes: one call for all, which also tells whether a signal asked one of them to end."""
    global _others_asked
    if world() == 1:
        return xs
    flat = torch.cat([*(x.reshape(-1).to(xs[0].dtype) for x in xs), torch.full((1,), float(_asked is not None), dtype=xs[0].dtype, device=xs[0].device)])
    add_up(flat)
    *parts, _others_asked = flat.split([*(x.numel() for x in xs), 1])
    return [p.view(x.shape) for p, x in zip(parts, xs, strict=True)]


def averaged(x):
    """x is the same on every process but for rounding; what is returned, to the bit."""
    return x if world() == 1 else summed(x)[0] / world()


def _asked_to_end(step):
    """The signal that asked this run to end, if one did: all processes of a job agree, for they stop after the same update."""
    if world() == 1:
        return _asked
    if _others_asked is None or (_others_asked.is_cuda and step % 16):  # reading it, a GPU is waited for
        return None
    return (_asked or signal.SIGTERM) if _others_asked.item() else None


def gathered(x):
    """x (n,) of every process, on the CPU: (world, n)."""
    if world() == 1:
        return x[None]
    out = [torch.empty_like(x) for _ in range(world())]
    with together():
        dist.all_gather(out, x)
    return torch.stack(out)


# ---- files: whole or not at all --------------------------------------------------------------------------------------


def write(path, blob: bytes):
    """Write to a temporary name beside `path`, flush, rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed in mid-run
        tmp.unlink(missing_ok=True)
        with open(tmp, "xb") as f:  # never through a link that somebody laid there
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if os.name == "posix":  # the new name too, should the power fail
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise UserError(f"can't write {path}: {e.strerror}; choose another --out-dir or free the space") from None


def read_json(path):
    """The JSON object in `path`, or None where there is no such file or it is damaged."""
    try:
        x = json.loads(Path(path).read_bytes())
        return x if isinstance(x, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path, x):
    write(path, json.dumps(x, indent=1, default=float).encode())


_locks = {}  # open files by path, whose locks the system gives back when the process ends, however it ends
NOT_OF_A_RUN = ("out_dir", "overwrite", "resume", "checkpoint_interval", "data_device", "tensorboard", "wandb")  # options that don't change what comes out


def settings(cfg) -> dict:
    """What makes a run what it is, as config.json holds it."""
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_OF_A_RUN} | {"processes": world()}, default=str))


def start(out_dir, cfg) -> bool:
    """Make out_dir ready for a run with these settings; False where that very run is there already, finished.

    A run is finished once its metrics.json is there, which is written last. One with other settings, an unfinished one, or one that another process is at is
    never overwritten unasked.
    """
    join(cfg)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts
        cfg.resume = True
    return bool(told(rank() or _start(out_dir, cfg)))


def _start(out_dir, cfg) -> bool:
    out_dir, new, unfinished = Path(out_dir), settings(cfg), (Path(out_dir) / Checkpoint.NAME).exists()
    finished = read_json(out_dir / "metrics.json") is not None
    old = {"processes": 1} | (read_json(out_dir / "config.json") or {})
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]
    if not cfg.overwrite and (finished or (cfg.resume and unfinished)):
        if not changed and finished:
            return False
        if changed:
            raise UserError(f"{out_dir} holds {'a finished' if finished else 'an unfinished'} run with other settings ({', '.join(changed)}); "
                            f"choose another --out-dir or add --overwrite")  # fmt: skip
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock(out_dir)
        if unfinished and not (cfg.resume or cfg.overwrite):
            raise UserError(f"{out_dir} holds an unfinished run: --resume goes on with it, --overwrite begins anew; or choose another --out-dir")
        for f in out_dir.glob("*.tmp"):  # of a killed run
            f.unlink()
        for name in ("metrics.json", *(() if cfg.resume and not changed else (Checkpoint.NAME,))):
            (out_dir / name).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"can't write to {out_dir}: {e.strerror}; choose another --out-dir") from None
    write_json(out_dir / "config.json", new)
    return True


def lock(out_dir: Path):
    """Hold RUN/.lock until the process ends; UserError where another process does. Without fcntl (Windows) nobody is kept out."""
    try:
        import fcntl
    except ImportError:
        return
    path = out_dir.resolve() / ".lock"
    if path in _locks and path.exists() and os.path.samestat(os.fstat(_locks[path].fileno()), path.stat()):
        return
    f = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")  # noqa: SIM115 - it lives as long as the process
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir}: another run is at it (process {f.read().strip()}); wait for its end or choose another --out-dir") from None
    f.truncate(0)
    f.write(f"{os.getpid()} on {platform.node()}")
    f.flush()
    _locks[path] = f


class Log:
    """log.csv, a row at a time; the columns are those of the first row. at: go on after so many bytes. trackers: where else rows go to."""

    def __init__(self, path, at=0, trackers=()):
        self.path, self.at, self.waiting, self.full, self.trackers = Path(path), at, io.StringIO(newline=""), False, trackers
        if not at:
            self.path.unlink(missing_ok=True)
        elif self.path.is_symlink() or not self.path.exists() or self.path.stat().st_size < at:
            raise UserError(f"{path} is not there, or shorter than its checkpoint says; --overwrite in place of --resume begins anew")
        if at:
            with open(path, newline="") as f:
                self.writer = csv.DictWriter(self.waiting, next(csv.reader(f)))
            os.truncate(path, at)
        else:
            self.writer = None

    def row(self, **values):
        if self.writer is None:
            self.writer = csv.DictWriter(self.waiting, values)
            self.writer.writeheader()
        self.writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in values.items()})
        self.track(**values)

    def track(self, **values):
        for t in self.trackers:
            t.track(values["step"], {k: v for k, v in values.items() if k != "step" and v is not None})

    def flush(self):
        """Put the waiting rows into the file: all, or, where the disk is full, none, which then wait for the next time."""
        text = self.waiting.getvalue().encode()
        try:
            with open(self.path, "ab") as f:
                if f.tell() < self.at:  # removed in mid-run, with the rows before
                    self.at, text = 0, f"{','.join(self.writer.fieldnames)}\r\n".encode() + text
                f.truncate(self.at)
                f.write(text)
        except OSError as e:
            if not self.full:
                print(f"can't write {self.path}: {e.strerror}; the run goes on, its rows wait for room", file=sys.stderr, flush=True)
            self.full = True
            return
        self.at, self.full = self.at + len(text), False
        self.waiting.seek(0)
        self.waiting.truncate()


class TensorBoard:
    """--tensorboard: the log's columns as scalars, in RUN."""

    def __init__(self, cfg, out, step):
        from torch.utils.tensorboard import SummaryWriter

        for old in () if step else out.glob("events.out.tfevents.*"):  # of a run that this one replaces
            old.unlink()
        self.writer = SummaryWriter(str(out), purge_step=step)
        atexit.register(self.close)

    def track(self, step, values):
        for k, v in values.items():
            self.writer.add_scalar(k, v, step)

    def close(self):
        self.writer.close()


class WandB:
    """--wandb: the log's columns in a run of project manyteachers, whose id RUN/wandb.json keeps for --resume; `WANDB_MODE=offline` for want of a network."""

    def __init__(self, cfg, out, step):
        import wandb

        known = read_json(out / "wandb.json") if step else None
        self.run = wandb.init(project="manyteachers", name=str(out), dir=str(out), config=settings(cfg), id=known and known["id"], resume="allow")
        write_json(out / "wandb.json", {"id": self.run.id})

    def track(self, step, values):
        self.run.log(values, step=step)

    def close(self):
        self.run.finish()


class Checkpoint:
    """A training that can be stopped and resumed: all that it changes, in RUN/checkpoint.safetensors.

        saved = Checkpoint(out, cfg, {"theta": theta, ...}, {"windows": generator}, about=...)
        first, log = saved.restore()
        with saved:
            for step in range(first, steps):
                ...
                saved.after(step + 1)

    state: tensors, restored in place; generators: torch.Generators, besides those of Python, numpy and torch itself; about: JSON that must not have changed
    (the data's description, say). Inside `with`, SIGTERM and SIGINT wait for the end of an update, and then end the run with a checkpoint.
    """

    NAME = "checkpoint.safetensors"

    def __init__(self, out, cfg, state, generators, about):
        self.path, self.cfg, self.state, self.generators = Path(out) / self.NAME, cfg, state, generators
        self.about = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.log, self.bytes, self.written, self.before, self.start = None, 0, None, 0.0, time.perf_counter()

    @property
    def seconds(self):
        """Of training so far, those before a resume too."""
        return self.before + time.perf_counter() - self.start

    def restore(self):
        """The step to go on from, 0 where nothing is resumed, and the log."""
        step = self._restored() if told(int(self.cfg.resume and self.path.exists())) else 0
        if world() > 1:
            for x in self.state.values():
                with together():
                    dist.broadcast(x, 0)
        if not rank():
            trackers = [t(self.cfg, self.path.parent, step) for t, on in ((TensorBoard, self.cfg.tensorboard), (WandB, self.cfg.wandb)) if on]
            self.log = Log(self.path.with_name("log.csv"), self.bytes, trackers)
        return step, self.log

    def _restored(self):
        try:
            with safetensors.safe_open(self.path, "pt") as f:
                at, tensors = json.loads(f.metadata()["about"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            if at["about"] != self.about:
                raise UserError(f"{self.path} was written for other data; --overwrite in place of --resume begins anew")
            for name, x in self.state.items():
                x.copy_(tensors[name].view(x.shape))
            for name, g in self.generators.items():
                g.set_state(tensors[f"generator {name}"])
            torch.set_rng_state(tensors["generator torch"][rank()].clone())
            if torch.cuda.is_available() and "generator cuda" in tensors:
                torch.cuda.set_rng_state(tensors["generator cuda"][rank()].clone())
            python, numpy = at["python"], at["numpy"]
            random.setstate((python[0], tuple(python[1]), python[2]))
            np.random.set_state((numpy[0], tensors["generator numpy"].numpy().view(np.uint32), *numpy[1:]))
            self.before, step, self.bytes = float(at["seconds"]), int(at["step"]), int(at["log"])
        except UserError:
            raise
        except Exception as e:  # a damaged file can fail in any of these steps, each with its own exception
            raise UserError(f"{self.path} is damaged ({(str(e).splitlines() or [type(e).__name__])[0][:200]}); --overwrite in place of --resume begins anew") from None
        print(f"resumed from {self.path} after {step} updates", flush=True)
        return step

    def save(self, step):
        """Called by all processes of a job; rank 0 writes."""
        of_all = {"generator torch": gathered(torch.get_rng_state())}
        if torch.cuda.is_available():
            of_all["generator cuda"] = gathered(torch.cuda.get_rng_state())
        if rank():
            self.written = step
            return
        self.log.flush()
        numpy = np.random.get_state()
        tensors = {k: x.detach().cpu().clone().contiguous() for k, x in self.state.items()}
        tensors |= {f"generator {k}": g.get_state() for k, g in self.generators.items()}
        tensors |= {"generator numpy": torch.from_numpy(numpy[1].view(np.int32)), **of_all}
        about = {"step": step, "seconds": self.seconds, "log": self.log.at, "about": self.about, "python": random.getstate(), "numpy": [numpy[0], *numpy[2:]]}
        write(self.path, safetensors.torch.save(tensors, {"about": json.dumps(about)}))
        self.written = step

    def after(self, step):
        """After an update, `step` of them done: write a checkpoint if one is due; end the run if a signal asked for it."""
        asked = _asked_to_end(step)
        if asked is None and step % self.cfg.checkpoint_interval:
            return
        try:
            self.save(step)
        except UserError as e:
            print(f"{e}; the run goes on without this checkpoint", file=sys.stderr, flush=True)
        if asked is not None:
            kept = "; the same command with --resume goes on from there" if self.written == step else ", not saved"
            raise Stopped(asked, f"stopped after {step} updates{kept}")

    def __enter__(self):
        global _holding
        _holding, self.start = True, time.perf_counter()

    def __exit__(self, exception, *_):
        global _holding, _asked
        _holding = False
        if _asked is not None and exception is None:  # asked for after the last update
            raise Stopped(_asked)
        _asked = None

    def finish(self):
        """The run is whole, its metrics.json written: its checkpoint has done its work."""
        self.path.unlink(missing_ok=True)
        tasks = read_json(self.path.with_name("metrics.json"))["tasks"]
        self.log.track(step=self.cfg.steps, **{f"{name}/{k}": v for name, m in tasks.items() for k, v in m.items() if isinstance(v, float)})
        for t in self.log.trackers:
            t.close()


def read_csv(path) -> dict[str, np.ndarray]:
    """A log.csv as a column of floats each, NaN where a cell is empty; UserError where it is not there."""
    try:
        with open(path, newline="") as f:
            head, *rows = csv.reader(f)
    except OSError as e:
        raise UserError(f"can't read {path}: {e.strerror}; train again with --overwrite") from None
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
    """(steps, 4), at least WARM_UP rows: every step's learning rate, AdamW's bias corrections, and number from 1, as kernels.project.project_adamw reads them on
    the device."""
    rows = range(max(steps, WARM_UP))
    return torch.tensor([[learning_rate(t, steps, peak, warmup), 1 - betas[0] ** (t + 1), 1 - betas[1] ** (t + 1), t + 1] for t in rows])


WARM_UP = 3  # calls of a function before it is captured


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
            for _ in range(WARM_UP):
                f()
        torch.cuda.current_stream().wait_stream(side)
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            f()
        replay = lambda kept=f: graph.replay()  # noqa: E731 - the graph reads f's own tensors where they lie: they must live as long as it does
    except RuntimeError as e:
        print(f"no CUDA graph here ({str(e).splitlines()[0]}): updates are launched one by one", flush=True)
        replay = f
    for x, y in zip(state, before, strict=True):
        x.copy_(y)
    generator.set_state(seed)
    return replay


def cell(v) -> str:
    """A number, text or None as a table shows it."""
    return v if isinstance(v, str) else "-" if v is None else f"{v:.0f}" if abs(v) >= 100 else f"{v:.3g}"


def table(rows: list[dict]) -> str:
    """Rows as aligned text, numbers to the right; a row may lack a column."""
    columns = list(dict.fromkeys(k for r in rows for k in r))
    cells = [columns, *([cell(r.get(k)) for k in columns] for r in rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, width, strict=True))) for r in cells)


def line(step, steps, seconds, text) -> str:
    """The one line of an interval: step, what is measured, rate and remaining time."""
    left = round(seconds / step * (steps - step))
    return f"step {step:>{len(str(steps))}}/{steps} | {text} | {step / seconds:5.1f} it/s | {left // 60}:{left % 60:02} left"
