"""Train one teacher: a Decision Transformer on one offline dataset, by negative log-likelihood.

    python teacher.py --env hopper
    python teacher.py --dataset mujoco/hopper/medium-v0
    torchrun --nproc_per_node=8 teacher.py --env hopper

Out come config.json, log.csv, metrics.json, model.safetensors and model.json in out/teacher-<task>.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import data
import evaluate
import kernels
import model as dt
import run
from kernels.project import project_adamw


@dataclasses.dataclass
class Config:
    # task
    env: str = "hopper"  # a key of data.ENVS
    dataset: str = ""  # a Minari id, in place of --env
    # model
    context: int = 20  # K, timesteps
    n_layer: int = 3  # transformer blocks
    n_head: int = 1  # of attention
    n_embd: int = 128  # channels
    dropout: float = 0.0  # share of activations; 0.1 in kzl's code; in this short a training on 200,000 steps there is nothing to regularise
    # optimisation
    steps: int = 5000  # updates
    batch_size: int = 32  # windows per update, of each process; 64 and half the updates learn less from as many windows
    lr: float = 3e-3  # AdamW's peak, after linear warm-up; then linear decay to zero
    warmup: int = 100  # updates
    weight_decay: float = 1e-4  # AdamW's, times the learning rate
    grad_clip: float = 0.25  # largest norm of an update's gradient
    # run
    out_dir: str = ""  # default: out/teacher-<task>
    eval_episodes: int = 20  # per target return; 0: none
    seed: int = 0  # of weights, windows and the held-out split
    device: str = "auto"  # cpu, cuda, or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the blocks' matrix products in training; auto: bfloat16 where native
    data_device: Literal["auto", "device", "host"] = "auto"  # where the data lie; auto: on the host, mapped from a file, if they would fill half of the device's memory
    log_interval: int = 100  # updates between rows of log.csv
    tensorboard: bool = False  # also log there: tensorboard --logdir out
    wandb: bool = False  # also log to Weights & Biases, project manyteachers
    checkpoint_interval: int = 1000  # updates between checkpoints, besides those that SIGTERM and SIGINT ask for
    resume: bool = False  # go on from the last checkpoint, if there is one
    overwrite: bool = False  # replace a run of other settings, or an unfinished one


def directory(name: str) -> Path:
    """Where the teacher of a task (a key of data.ENVS or a Minari id) is kept if not told otherwise."""
    return Path("out") / f"teacher-{name.replace('/', '-')}"


def main(cfg: Config):
    """Train and evaluate; returns the run's directory. Skips a run that is there already."""
    run.check(cfg, steps=1, batch_size=1, lr=0, warmup=1, context=1, n_layer=1, n_head=1, n_embd=1, log_interval=1, eval_episodes=0, seed=0,
              checkpoint_interval=1, dropout=0, grad_clip=1e-9, weight_decay=0)  # fmt: skip
    if cfg.dropout >= 1:
        raise run.UserError(f"--dropout {cfg.dropout}: must be below 1")
    if cfg.n_embd % cfg.n_head:
        raise run.UserError(f"--n-embd {cfg.n_embd}: must be a multiple of --n-head {cfg.n_head}")
    if cfg.context > dt.MAX_CONTEXT:
        raise run.UserError(f"--context {cfg.context}: must be at most {dt.MAX_CONTEXT}")
    name = data.task_name(cfg.dataset) if cfg.dataset else cfg.env
    if not cfg.dataset:
        data.dataset_id(cfg.env)  # a mistyped env is told before anything is done
    out = Path(cfg.out_dir) if cfg.out_dir else directory(name)
    if not run.start(out, cfg):
        print(f"teacher of {name} is there: {out} (--overwrite to train it again)")
        return out

    # ---- data and model ----------------------------------------------------------------------------------------------
    clock, device = run.Clock(), run.device(cfg)
    with clock("data"):
        with run.first():
            ds = data.load(name, cfg.seed)
        task = ds.task
        if cfg.eval_episodes:
            evaluate.check([task])
        train = data.Windows([ds.train], [task], cfg.context, device, cfg.data_device)
        held_out = data.Windows([ds.held_out], [task], cfg.context, device, cfg.data_device).spread(256)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    model = dt.DecisionTransformer(dt.ModelConfig.of([task], n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, context=cfg.context, dropout=cfg.dropout))
    model = model.to(device)
    model.bfloat16 = run.bfloat16(cfg)
    theta = dt.flatten(model)
    if run.rank():
        torch.manual_seed(cfg.seed + 2**32 * run.rank())  # dropout's masks differ among the processes, and nothing else
    print(f"{task.name}: {len(ds.lengths)} episodes, {ds.lengths.sum():,} steps; teacher of {model.n_params:,} parameters on {device}, "
          f"blocks in {'bfloat16' if model.bfloat16 else 'float32'}; kernels: {kernels.path(device)}", flush=True)  # fmt: skip

    def nll(b):
        return dt.mean_nll(*model(0, *b[1:6]), b.actions, b.mask, task.discrete)

    def held_out_nll():
        model.eval()
        with torch.no_grad():
            held = nll(held_out).item()
        model.train()
        return held

    # ---- training ----------------------------------------------------------------------------------------------------
    share, schedule = torch.ones(1, device=device), run.schedule(cfg.steps, cfg.lr, cfg.warmup).to(device)
    m, v = torch.zeros_like(theta.data), torch.zeros_like(theta.data)  # AdamW's moments
    done, alive = torch.zeros(1, dtype=torch.long, device=device), torch.ones((), dtype=torch.bool, device=device)
    record = torch.zeros(cfg.log_interval, 2, device=device)  # loss and gradient norm of every update

    def update():
        """One update, in which nothing waits for the device."""
        batch = train.sample(cfg.batch_size, share, generator)
        loss, tokens = nll(batch), batch.mask.sum()
        total, all_tokens = run.summed(loss.detach() * tokens, tokens)
        theta.grad.zero_()
        (loss * (tokens / all_tokens)).backward()  # of the mean over all processes' tokens
        run.add_up(theta.grad)
        with torch.no_grad():
            norm = project_adamw(theta, theta.grad, None, m, v, schedule[done][0], alive, clip=cfg.grad_clip, weight_decay=cfg.weight_decay)[2]
            record[done % cfg.log_interval] = torch.stack((total / all_tokens, norm))
            done.add_(1)

    meta = {"tasks": [dataclasses.asdict(task)]}
    state = {"theta": theta.data, "m": m, "v": v, "done": done, "alive": alive, "record": record}
    if kernels.compiled(device) and not train.host and run.world() == 1:
        update = run.captured(update, list(state.values()), generator)
    saved = run.Checkpoint(out, cfg, state, {"windows": generator}, dataclasses.asdict(task))
    first, log = saved.restore()
    with clock("train"), tqdm(total=cfg.steps, initial=first, unit="step", desc=f"teacher {task.name}", disable=True if run.rank() else None) as bar, saved:
        for step in range(first, cfg.steps):
            update()
            bar.update()
            if not run.rank() and ((step + 1) % cfg.log_interval == 0 or step + 1 == cfg.steps):
                rows = record[: step % cfg.log_interval + 1].tolist()
                for i, (loss, norm) in enumerate(rows, step + 1 - len(rows)):
                    if not math.isfinite(loss + norm):  # this update was not applied, nor any after it: the parameters are still the last good ones
                        dt.save(out, model, meta)
                        raise run.UserError(f"loss {loss:.4g}, gradient norm {norm:.4g} in step {i + 1} of teacher {task.name}: stopped; "
                                            f"the model before that step is kept in {out}; try a lower --lr than {cfg.lr:g}")  # fmt: skip
                held, lr = held_out_nll(), run.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
                log.row(step=step + 1, nll=loss, heldout_nll=held, grad_norm=norm, lr=lr, seconds=saved.seconds)
                log.flush()
                bar.write(run.line(step + 1, cfg.steps, saved.seconds, f"nll {loss:7.3f} | held-out {held:7.3f} | grad {norm:6.2f}"))
            saved.after(step + 1)
    if run.rank():
        run.meet()  # when rank 0 is done
        return out
    held, trained = held_out_nll(), saved.seconds
    model.eval()
    dt.save(out, model, meta)

    # ---- evaluation --------------------------------------------------------------------------------------------------
    metrics = {"target": task.targets["p95"], "return_mean": None, "return_std": None, "normalized_score": None, "retention": None,
               "heldout_kl": None, "heldout_nll": held}  # fmt: skip
    with clock("evaluate"):
        if cfg.eval_episodes and task.env_id:
            for target, value in task.targets.items():
                got = evaluate.scores(evaluate.rollout(model, task, 0, value, cfg.eval_episodes, 1000)[0], task)
                metrics |= got if target == "p95" else {target: {"target": value, **got}}
                print(f"{task.name}: target {value:.0f} ({target}) -> return {got['return_mean']:.0f} +- {got['return_std']:.0f}, "
                      f"score {got['normalized_score']:.1f} (mean and std of {cfg.eval_episodes} episodes)", flush=True)  # fmt: skip
    run.write_json(out / "metrics.json", {"tasks": {task.name: metrics}, "compression": None, "parameters": model.n_params,
                                          "seconds": {**clock.seconds, "train": round(trained, 2)}, "machine": run.machine(cfg)})  # fmt: skip
    saved.finish()
    run.meet()
    return out


if __name__ == "__main__":
    run.cli(main, Config, __doc__)
