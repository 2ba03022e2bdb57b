"""Whether a model does what it is asked for: flags, and the line printed after training.

`verdict` judges one task's metrics, as metrics.json holds them. Symptoms are seen in returns, causes in data
and training. A cause alone says nothing against a model whose returns are good: causes are reported beside a
symptom, or where nothing was evaluated. The table of flags is in docs/operations.md.

Used by teacher.py, distill.py, evaluate.py and report.py.
"""

import math
from typing import Any, NamedTuple

SHARE_OF_TARGET = 0.8  # of the return asked for, and of the teacher's score, that a model should obtain
SHARE_OF_DATA = 0.9  # of the data's mean return
CLEARLY_MORE = 0.1  # of the data's range of returns, and more than two standard errors
FEW_EPISODES = 10  # of training
FEW_STEPS = 100  # of training, for each dimension of observations and actions
SATURATED = 0.5  # share of action components on their bounds
DETERMINISTIC = math.log(0.05)  # mean log-std; below it distill.py's --sigma-floor hides the difference
OVERFIT = 0.1  # nats per action dimension by which the held-out NLL rose

Metrics = dict[str, Any]  # of one task, in metrics.json; what they lack is not judged


class Flag(NamedTuple):
    name: str
    finding: str  # with its numbers
    remedy: str


class Verdict(NamedTuple):
    symptoms: list[Flag]  # the last one's remedy is the one to try
    causes: list[Flag]  # likeliest first

    def names(self) -> list[str]:
        return [flag.name for flag in (*self.symptoms, *self.causes)]

    def line(self, who: str) -> str:
        """What is printed: symptoms, likely causes, remedy, in one line; empty if all is well.

        who: the task, and whether it is a teacher or a student.
        """
        if not self.names():
            return ""
        symptoms = ", ".join(f"{flag.name} ({flag.finding})" for flag in self.symptoms)
        causes = ", ".join(f"{flag.name} ({flag.finding})" for flag in self.causes)
        if not symptoms:
            findings = f"not evaluated, caution: {causes}"
        else:
            findings = f"{symptoms}; likely cause: {causes}" if causes else symptoms
        remedies = [flag.remedy for flag in (*self.causes[:1], *self.symptoms[-1:])]
        return f"{who}: {findings}; remedy: {', or '.join(remedies)}"


def verdict(task: Any, metrics: Metrics, teacher: Metrics | None = None) -> Verdict:
    """task: a data.Task. teacher: the metrics of a student's teacher, which also holds its causes."""
    found = _symptoms(task, metrics)
    if teacher is not None:
        found += _symptoms_of_student(task, metrics, teacher)
    judge_causes = found or (metrics.get("return_mean") is None and teacher is None)
    return Verdict(found, _causes(task, metrics) if judge_causes else [])


def lines(
    tasks: list[Any], metrics: dict[str, Metrics], teachers: dict[str, Metrics] | None = None
) -> list[str]:
    """What is printed of a run, {task: metrics}; teachers: those of a student's teachers, before its own."""
    found = []
    for task in tasks:
        if task.name not in metrics:
            continue
        of_task = metrics[task.name]
        if teachers is None:
            found.append(verdict(task, of_task).line(f"{task.name}, teacher"))
            continue
        teacher = teachers.get(task.name, {})
        of_teacher = verdict(task, teacher)
        if of_teacher.symptoms or of_task.get("return_mean") is None:
            found.append(of_teacher.line(f"{task.name}, teacher"))
        found.append(verdict(task, of_task, teacher).line(f"{task.name}, student"))
    return [line for line in found if line]


def _symptoms(task, metrics):
    mean = metrics.get("return_mean")
    if mean is None:
        return []
    target = metrics["target"]
    low = min(task.reference[0], 0.0)  # a random policy's return; the data's lowest may be an expert's
    found = []
    if target > low and mean - low < SHARE_OF_TARGET * (target - low):
        share = 100 * (mean - low) / (target - low)
        finding = f"asked for {target:.0f}, returns {mean:.0f}: {share:.0f} % of the way from {low:.0f}"
        remedy = "ask for another return (evaluate.py --sweep shows what each gives)"
        found.append(Flag("below-target", finding, remedy))
    of_data = (metrics.get("data") or {}).get("return_mean", low)
    if of_data > low and mean - low < SHARE_OF_DATA * (of_data - low):
        finding = f"returns {mean:.0f}, the data's episodes on average {of_data:.0f}"
        remedy = "train for more --steps, or the teacher with more --context if observations hide a state"
        found.append(Flag("below-data", finding, remedy))
    better = _better_lower_target(task, metrics)
    if better:
        lower = f"{better['target']:.0f}"
        finding = (
            f"asked for {lower}, returns {better['return_mean']:.0f}; asked for {target:.0f}, {mean:.0f}"
        )
        found.append(Flag("inverted", finding, f"ask for {lower} (--target {better['name']})"))
    return found


def _better_lower_target(task, metrics):
    """Of the targets below the default one, that which gives most, if it gives clearly more; or None."""
    others = [*(metrics.get("sweep") or [])]
    if metrics.get("median"):
        others.append({"name": "median", **metrics["median"]})
    data = metrics.get("data") or {"return_min": task.reference[0], "return_max": task.reference[1]}
    margin = CLEARLY_MORE * (data["return_max"] - data["return_min"])
    clearly_more = []
    for other in others:
        more = other["return_mean"] - metrics["return_mean"]
        noise = 2 * math.hypot(_standard_error(other), _standard_error(metrics))
        if other["target"] < metrics["target"] and more > margin and more > noise:
            clearly_more.append(other)
    return max(clearly_more, key=lambda other: other["return_mean"], default=None)


def _standard_error(metrics):
    """Of a mean return; infinite for a single episode."""
    n = metrics.get("episodes") or 1
    return metrics["return_std"] / math.sqrt(n - 1) if n > 1 else math.inf


def _symptoms_of_student(task, metrics, teacher):
    found = []
    retention = metrics.get("retention")
    if retention is not None and retention < SHARE_OF_TARGET and teacher["normalized_score"] > 0:
        what = "success rate" if metrics.get("retention_of") == "success" else "score"
        finding = f"{100 * retention:.0f} % of its teacher's {what}"
        found.append(Flag("below-teacher", finding, "train for more --steps, or with more --n-embd"))
    of_teacher = [flag.name for flag in _symptoms(task, teacher)]
    if of_teacher:
        remedy = "mend the teacher, then distil again with --overwrite"
        found.append(Flag("teacher-flagged", ", ".join(of_teacher), remedy))
    return found


def _causes(task, metrics):
    found = []
    data = metrics.get("data") or {}
    dimensions = task.obs_dim + task.act_dim
    episodes = data.get("episodes", math.inf)
    steps = data.get("steps", math.inf)
    rise = metrics.get("heldout_nll_rise") or 0.0
    log_std = metrics.get("heldout_log_std") or 0.0  # None: of discrete actions
    if rise > OVERFIT:
        finding = f"the held-out NLL rose by {rise:.2f} nats from its minimum"
        found.append(Flag("overfit", finding, "fewer --steps, or --dropout 0.1"))
    if episodes < FEW_EPISODES or steps < FEW_STEPS * dimensions:
        finding = f"{episodes} episodes of {steps:,} steps are few for {dimensions} dimensions"
        found.append(Flag("few-data", finding, "collect more episodes"))
    if log_std < DETERMINISTIC:
        finding = f"actions hardly vary (std {math.exp(log_std):.2f} of half their range)"
        found.append(Flag("deterministic", finding, "collect episodes with noise added to the actions"))
    if data.get("saturation", 0) > SATURATED:
        finding = f"{100 * data['saturation']:.0f} % of the action components lie on their bounds"
        found.append(Flag("saturated", finding, "collect episodes whose actions stay inside their bounds"))
    return found
