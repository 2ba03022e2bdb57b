"""Run directories on the Hugging Face Hub: hf://organisation/name, or with @ and a revision.

Used by teacher.find and export.py.
"""

import re
from pathlib import Path
from typing import Any

from support import UserError, first_line

FILES = ("model.json", "model.safetensors", "config.json", "metrics.json")


def directory(address: str) -> Path:
    """A run directory: where the address is on the hub, the copy in its cache, downloaded if it is not there.

    Only FILES are fetched; model.load checks them like any others. Raises UserError where that fails.
    """
    if not address.startswith("hf://"):
        return Path(address)
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if not found:
        raise UserError(
            f"{address}: an address on the hub is hf://organisation/name or hf://organisation/name@revision"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=list(FILES)))
    except Exception as e:  # noqa: BLE001 - whatever the hub's client raises
        reason = first_line(e)[:150]
        raise UserError(
            f"{address} is not in the hub's cache and can't be downloaded ({type(e).__name__}: {reason}); "
            f"check the name and the network, or copy the run directory and name that"
        ) from None


def model_card(name: str, tasks: list[Any], metrics: dict[str, dict[str, Any]], parameters: int) -> str:
    """README.md of a run on the hub: what it is, how to act with it, and what it returned.

    tasks: data.Task. metrics: {task: as in metrics.json}; tasks without a return have no row.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    lines = []
    for task in tasks:
        m = metrics.get(task.name) or {}
        if m.get("return_mean") is None:
            continue
        returned = f"{m['return_mean']:.6g} +/- {m['return_std']:.3g}"
        lines.append(f"| {task.name} | {task.env_id} | {m['target']:.6g} | {returned} | {m['episodes']} |")
        results.append(
            EvalResult(
                task_type="reinforcement-learning",
                dataset_type=task.env_id,
                dataset_name=task.env_id,
                dataset_args={"dataset": task.dataset, "target_return": m["target"]},
                metric_type="mean_reward",
                metric_value=returned,
                metric_name="return",
            )
        )
    about = ModelCardData(
        model_name=name,
        library_name="manyteachers",
        pipeline_tag="reinforcement-learning",
        tags=["offline-rl", "decision-transformer", "onnx"],
        eval_results=results or None,
    )
    head = [
        "| task | environment | target return | return, mean +/- std | episodes |",
        "|---|---|---|---|---|",
    ]
    table = "\n".join(head + lines if lines else ["Nothing was evaluated."])
    return f"""---
{about.to_yaml()}
---

# {name}

A Decision Transformer of {parameters:,} parameters for {len(tasks)} task(s), trained offline by manyteachers.
Weights are in `model.safetensors`, all else that acting needs in `model.json`; `<task>.onnx`, and
`all-tasks.onnx` of several tasks, act with onnxruntime alone.

{table}

```python
from policy import Policy

policy = Policy("path/to/this/directory")
policy.reset("{tasks[0].name}", target_return={tasks[0].target:.6g})
```
"""
