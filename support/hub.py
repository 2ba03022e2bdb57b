"""A run directory shared on the Hugging Face Hub: hf://organisation/name, or with @ and a revision."""

import re
from pathlib import Path

from support import UserError

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
        reason = (str(e).strip().splitlines() or [""])[0][:150]
        raise UserError(
            f"{address} is not in the hub's cache and can't be downloaded ({type(e).__name__}: {reason}); "
            f"check the name and the network, or copy the run directory and name that"
        ) from None
