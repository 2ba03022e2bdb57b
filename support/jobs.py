"""Trainings side by side, each a process of its own. Used by teacher.py and cli.py."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading

from tqdm import tqdm

from support import processes, signals

IS_JOB = "MANYTEACHERS_JOB"  # set in the environment of what `run` starts


def run(commands: dict[str, list[str]], slots: list[dict[str, str]], steps: int) -> dict[str, str]:
    """Run Python scripts of `steps` updates each and print their lines, each behind its script's name.

    commands: the interpreter's arguments, by name. slots: one for each script that may run at a time; what it
    adds to the environment. Returns {name: reason} of those that failed, once all have ended.
    SIGTERM and SIGINT are passed on: the scripts end with checkpoints, then this raises Stopped. A second
    signal kills them.
    """
    jobs = _Jobs(commands, slots, steps)
    signals.begin_deferring()
    try:
        failures = jobs.run()
    except BaseException:
        signals.end_deferring(failed=True)
        raise
    finally:
        for process, _ in jobs.running.values():  # whatever ended `jobs.run`, none is left behind
            process.kill()
            process.wait()
    signals.end_deferring(failed=False)
    return failures


class _Jobs:
    def __init__(self, commands, slots, steps):
        self.commands = commands
        self.waiting = list(commands)
        self.free_slots = list(slots)
        self.running = {}  # {name: (process, its slot)}
        self.lines = queue.SimpleQueue()  # (name, line) of all processes; (name, None) at the end of one
        self.last_lines = {}
        self.errors = {}
        self.done = {}  # updates
        silent = True if processes.rank() else None
        self.bar = tqdm(total=steps * len(commands), unit="step", desc="teachers", disable=silent)

    def run(self):
        failures = {}
        ending = False
        with self.bar:
            self._start()
            while self.running:
                if signals.requested is not None and not ending:
                    ending = True
                    self.waiting.clear()
                    for process, _ in self.running.values():
                        process.terminate()
                try:
                    name, line = self.lines.get(timeout=0.2)
                except queue.Empty:
                    continue
                if line is not None:
                    self._show(name, line)
                    continue
                process, slot = self.running.pop(name)
                if process.wait():
                    failures[name] = self._reason(name, process.returncode)
                self.free_slots.append(slot)
                self._start()
        return failures

    def _start(self):
        """Start as many as there are slots for."""
        while self.waiting and self.free_slots:
            name = self.waiting.pop(0)
            slot = self.free_slots.pop(0)
            # it is alone, whatever this process is part of
            env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
            env.pop("TORCHELASTIC_RESTART_COUNT", None)
            process = subprocess.Popen(
                [sys.executable, *self.commands[name]],
                env={**env, **slot, IS_JOB: "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,  # its end is what `end_with_parent` waits for
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # the terminal's Ctrl-C comes to this process alone
            )
            self.running[name] = process, slot
            threading.Thread(target=self._read, args=(name, process.stdout), daemon=True).start()

    def _read(self, name, output):
        for line in output:
            self.lines.put((name, line.rstrip()))
        self.lines.put((name, None))

    def _show(self, name, line):
        width = max(map(len, self.commands))
        self.bar.write(f"{name:{width}}  {line}")
        sys.stdout.flush()
        if line.startswith("error: "):
            self.errors[name] = line.removeprefix("error: ")
        if line:
            self.last_lines[name] = line
        step = re.match(r"step +(\d+)/|resumed from .* after (\d+) updates", line)
        if step:
            self.done[name] = int(step[1] or step[2])
            self.bar.n = sum(self.done.values())
            self.bar.refresh()

    def _reason(self, name, code):
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return self.errors.get(name) or self.last_lines.get(name) or f"exit code {code}"


def end_with_parent() -> None:
    """In a process that `run` started: send it SIGTERM once the one that started it has ended in any way."""
    if not os.environ.pop(IS_JOB, None):
        return

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
