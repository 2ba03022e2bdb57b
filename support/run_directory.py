"""A run's folder: who may write there, and what is there already. Used by teacher.py and distill.py.

A run is finished once its metrics.json exists, which is written last. A run is never overwritten without
--overwrite if it is unfinished or has other settings, and never while another process is using its folder.
"""

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

from support import UserError, files, processes
from support.checkpoint import Checkpoint

# Options that do not change what a run produces.
NOT_SETTINGS = (
    "out_dir",
    "overwrite",
    "resume",
    "checkpoint_interval",
    "jobs",
    "data_device",
    "imports",
    "tensorboard",
    "wandb",
)
_locks = {}  # open files by path; the system releases their locks when the process ends, however it ends


def settings(cfg: Any) -> dict[str, Any]:
    """The options of cfg, a dataclass, that decide what a run produces, as config.json holds them."""
    options = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_SETTINGS}
    return json.loads(json.dumps(options | {"processes": processes.world()}, default=str))


def start(out_dir: Path | str, cfg: Any) -> bool:
    """Prepare out_dir for a run with these settings. False: that very run is there already, finished.

    Raises UserError where out_dir holds another run, or can't be written.
    """
    processes.join(cfg)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts
        cfg.resume = True
    return bool(processes.broadcast_int(processes.rank() or _start(Path(out_dir), cfg)))


def _start(out_dir, cfg):
    unfinished = (out_dir / Checkpoint.NAME).exists()
    finished = files.read_json(out_dir / "metrics.json") is not None
    new = settings(cfg)
    old = {"processes": 1} | (files.read_json(out_dir / "config.json") or {})
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]
    if not cfg.overwrite and (finished or (cfg.resume and unfinished)):
        if changed:
            which = "a finished" if finished else "an unfinished"
            raise UserError(
                f"{out_dir} holds {which} run with other settings ({', '.join(changed)}); "
                f"choose another --out-dir or add --overwrite"
            )
        if finished:
            return False
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock(out_dir)
        if unfinished and not (cfg.resume or cfg.overwrite):
            raise UserError(
                f"{out_dir} holds an unfinished run: --resume goes on with it, --overwrite begins anew; "
                f"or choose another --out-dir"
            )
        _remove_remains(out_dir, keep_checkpoint=cfg.resume and not changed)
    except OSError as e:
        raise UserError(f"can't write to {out_dir}: {e.strerror}; choose another --out-dir") from None
    files.write_json(out_dir / "config.json", new)
    return True


def _remove_remains(out_dir, keep_checkpoint):
    for temporary in out_dir.glob("*.tmp"):  # of a killed run
        temporary.unlink()
    (out_dir / "metrics.json").unlink(missing_ok=True)
    if not keep_checkpoint:
        (out_dir / Checkpoint.NAME).unlink(missing_ok=True)


def lock(out_dir: Path) -> None:
    """Hold RUN/.lock until the process ends. Without fcntl (Windows) this does nothing.

    Raises UserError where another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return
    path = out_dir.resolve() / ".lock"
    if path in _locks and path.exists() and os.path.samestat(os.fstat(_locks[path].fileno()), path.stat()):
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    f = open(descriptor, "r+")  # noqa: SIM115 - it lives as long as the process
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{out_dir}: another run is at it (process {f.read().strip()}); "
            f"wait for its end or choose another --out-dir"
        ) from None
    f.truncate(0)
    f.write(f"{os.getpid()} on {platform.node()}")
    f.flush()
    _locks[path] = f
