"""Speed, side by side with what a user would pick instead -> results/bench_<device>.csv

    python bench.py                                   # ours alone
    python3 -m venv .venv-bench && .venv-bench/bin/pip install -r requirements-bench.txt
    python bench.py --peers .venv-bench/bin/python    # HuggingFace's and d3rlpy's too, in that environment
    python bench.py --what teacher                    # some rows

Every contender is a process of its own that waits while the others run; they take turns, `rounds` times round, and a row is the median.
teacher: a whole update with sampling, kzl's settings. rollout: an action, at a batch of 1 and of 64 environments, without the environments.
"""

import csv
import dataclasses
import io
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

K, O, A, C, LAYERS = 20, 11, 3, 128, 3  # kzl's settings for hopper (github.com/kzl/decision-transformer, gym/experiment.py): also 1 head, dropout 0.1
STEPS = 100_000  # timesteps of the synthetic data


@dataclasses.dataclass
class Config:
    what: tuple[Literal["teacher", "rollout"], ...] = ("teacher", "rollout")
    peers: str = ""  # python of an environment with requirements-bench.txt; none: ours alone
    device: str = "auto"  # cpu, cuda, or auto
    threads: int = 1  # of torch, on a CPU
    rounds: int = 5
    seconds: float = 1.0  # about how long a contender runs in a round
    out: str = ""  # default: results/bench_<device>.csv


# ---- contenders: each returns a function that does one step ------------------------------------------------------------


def episodes(n=STEPS, obs=O, act=A):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, obs, generator=g), torch.rand(n, act, generator=g) * 2 - 1, torch.rand(n, generator=g), torch.arange(n) % 1000


def windows(device, batch):
    """Batches for peers that leave sampling to their user: one gather, as ours."""
    tables = [x.to(device) for x in episodes()]
    back = torch.arange(K - 1, -1, -1, device=device)

    def sample():
        end = torch.randint(K, STEPS, (batch,), device=device)
        rows = end[:, None] - back
        s, a, rtg, t = (x[rows] for x in tables)
        return s, a, rtg, t, back <= t[:, -1:]

    return sample


def ours_teacher(device, dtype, batch):
    import data
    import kernels
    import model as dt
    import run
    from kernels.project import project_adamw

    s, a, rtg, t = episodes()
    task = data.Task("bench", "bench", None, {}, 1000, O, A, [], [], [], [], 1.0, {}, (0.0, 1.0), "", 0)
    train = data.Windows([torch.cat((s, a, rtg[:, None], t[:, None]), 1).numpy()], [task], K, device)
    model = dt.DecisionTransformer(dt.ModelConfig((O,), (A,), LAYERS, 1, C, K, 0.1)).to(device)
    model.bfloat16 = dtype == "bfloat16"
    theta, generator, share = dt.flatten(model), torch.Generator(device).manual_seed(0), torch.ones(1, device=device)
    m, v, alive = torch.zeros_like(theta.data), torch.zeros_like(theta.data), torch.ones((), dtype=torch.bool, device=device)
    schedule = run.schedule(10, 1e-4, 1)[5].to(device)

    def step():
        b = train.sample(batch, share, generator)
        theta.grad.zero_()
        dt.gaussian_nll(*model(0, *b[1:6]), b.actions, b.mask).backward()
        with torch.no_grad():
            project_adamw(theta, theta.grad, None, m, v, schedule, alive, weight_decay=1e-4)

    return run.captured(step, [theta.data, m, v, alive], generator) if kernels.compiled(device) else step


def huggingface(dropout=0.1):
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    return DecisionTransformerModel(DecisionTransformerConfig(
        state_dim=O, act_dim=A, hidden_size=C, max_ep_len=1000, n_layer=LAYERS, n_head=1, n_inner=4 * C, activation_function="relu", n_positions=1024,
        resid_pdrop=dropout, attn_pdrop=dropout, embd_pdrop=dropout))  # fmt: skip


def huggingface_teacher(device, dtype, batch):
    model, sample = huggingface().to(device).train(), windows(device, batch)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)

    def step():
        s, a, rtg, t, mask = sample()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            got = model(states=s, actions=a, rewards=None, returns_to_go=rtg[..., None], timesteps=t, attention_mask=mask.long()).action_preds
        loss = (got[mask].float() - a[mask]).square().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        opt.step()

    return step


def d3rlpy_teacher(device, dtype, batch):
    import d3rlpy

    s, a, rtg, t = (x.numpy() for x in episodes())
    data = d3rlpy.dataset.MDPDataset(s, a, rtg, (t == 999).astype("float32"))
    config = d3rlpy.algos.DecisionTransformerConfig(
        batch_size=batch, learning_rate=1e-4, context_size=K, max_timestep=1000, num_heads=1, num_layers=LAYERS, attn_dropout=0.1, resid_dropout=0.1,
        embed_dropout=0.1, activation_type="relu", encoder_factory=d3rlpy.models.VectorEncoderFactory([C]), compile_graph=device != "cpu")  # fmt: skip
    algo = config.create(device=device)
    algo.build_with_dataset(data)
    return lambda: algo.update(data.sample_trajectory_batch(batch, length=K))


def ours_rollout(device, dtype, batch):
    import model as dt

    model = dt.DecisionTransformer(dt.ModelConfig((O,), (A,), LAYERS, 1, C, K)).to(device).eval()
    s, a, rtg, t, mask = windows(device, batch)()

    @torch.inference_mode()
    def step():
        model(0, s, a, rtg, t, mask)[0][:, -1].cpu()

    return step


def huggingface_rollout(device, dtype, batch):
    """get_action of HuggingFace's own example (examples/decision_transformer), batched."""
    model = huggingface().to(device).eval()
    s, a, rtg, t, mask = windows(device, batch)()

    @torch.inference_mode()
    def step():
        model(states=s, actions=a, rewards=None, returns_to_go=rtg[..., None], timesteps=t, attention_mask=mask.long()).action_preds[:, -1].cpu()

    return step


# what: {contender: its function}; the first is ours, the others live in the peers' environment
ROWS = {
    "teacher": {"ours": ours_teacher, "huggingface": huggingface_teacher, "d3rlpy": d3rlpy_teacher},
    "rollout": {"ours": ours_rollout, "huggingface": huggingface_rollout},
}
BATCHES = {"teacher": (64,), "rollout": (1, 64)}
DTYPES = {"ours": ("float32", "bfloat16"), "huggingface": ("float32", "bfloat16"), "d3rlpy": ("float32",)}


# ---- taking turns ------------------------------------------------------------------------------------------------------


def work(what, contender, dtype, batch, device, threads):
    """A contender's process: for each number n on stdin, runs n steps and prints the seconds."""
    torch.set_num_threads(int(threads))
    step = ROWS[what][contender](device, dtype, int(batch))
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        print(f"seconds {time.perf_counter() - start}", flush=True)


def turn(process, n):
    """Seconds per step of n steps of a contender, while the others wait."""
    process.stdin.write(f"{n}\n")
    process.stdin.flush()
    for line in process.stdout:  # libraries talk on stdout too
        if line.startswith("seconds "):
            return float(line.split()[1]) / n
    raise RuntimeError(f"ended with code {process.wait()}; to see why: {' '.join(map(str, process.args))}")


def main(cfg: Config):
    import run

    device, rows = run.device(cfg), []
    for what in cfg.what:
        for batch in BATCHES[what]:
            contenders = {}
            for name in ROWS[what]:
                for dtype in DTYPES[name][: 1 if what == "rollout" else None]:  # acting is in float32
                    python = sys.executable if name == "ours" else cfg.peers
                    if python:
                        args = [python, __file__, "--work", what, name, dtype, str(batch), device, str(cfg.threads)]
                        contenders[name, dtype] = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

            n = {who: max(1, int(cfg.seconds / turn(p, 3))) for who, p in contenders.items()}
            times = {who: [] for who in contenders}
            for _ in range(cfg.rounds):
                for who, p in contenders.items():
                    times[who].append(turn(p, n[who]))
            for p in contenders.values():
                p.stdin.close()
            for (name, dtype), t in times.items():
                ms = 1e3 * statistics.median(t)
                rows.append({"what": what, "batch": batch, "contender": name, "dtype": dtype, "ms": round(ms, 4), "lowest": round(1e3 * min(t), 4),
                             "highest": round(1e3 * max(t), 4), "times_ours_float32": round(ms / (1e3 * statistics.median(times["ours", "float32"])), 3)})  # fmt: skip
                print(" ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    at = {**run.machine(SimpleNamespace(device=cfg.device, dtype="float32")), "threads": cfg.threads}
    del at["dtype"]  # each row has its own
    text = io.StringIO()
    out = csv.DictWriter(text, {**rows[0], **at})
    out.writeheader()
    out.writerows({**r, **at} for r in rows)
    run.write(Path(cfg.out or f"results/bench_{device.split(':')[0]}.csv"), text.getvalue().encode())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        import run

        run.cli(main, Config, __doc__)
