"""Examine this environment, or check that a checkpoint, a store or a cache file is intact.

Place in the flow: outside it, for when something does not work. The environment consists of versions, extras, devices
and attention. Every finding comes from the code that would do the work, so no rule is written twice. Reads headers,
configurations and cache files, and loads a checkpoint on disk that no one has checked yet; writes nothing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gisting._compat import is_version_in, requirements, untested
from gisting._version import __version__
from gisting.attention import choose_implementation, interval_attention
from gisting.errors import GistError
from gisting.source import local, weight_files
from gisting.visibility import gist as gist_visibility

if TYPE_CHECKING:
    from gisting.store.index import StoreEntry

__all__ = ["EXTRAS", "Finding", "examine_here", "examine_path"]

#: What each extra is for. A test checks that the names are those in the package's metadata.
EXTRAS = {
    "kernels": "attention on CUDA in fused kernels",
    "demo": "gisting demo: a model from a GGUF file, and the adapter for it",
    "train": "adapters (such as LoRA), and streamed data",
    "eval": "ROUGE, BLEU, plots and drawings",
    "internalize": "examples chosen by BM25, and LLMLingua-2",
    "sentencepiece": "tokenizers in SentencePiece files",
    "vllm": "gisting serve",
}

# What pip calls this package. `gisting` is an unrelated package with the same import name.
_DISTRIBUTION = "gist-tokens"
_DTYPES = (torch.float32, torch.bfloat16)
_HEAD_SIZE = 64
# What a damaged file makes its reader raise.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError)


@dataclass(frozen=True)
class Finding:
    """One result of an examination.

    Args:
        topic: the group it belongs to: ``"versions"``, ``"devices"``, ``"checkpoint"``, ...
        name: what was examined.
        value: what was found and, for a fault, what to do.
        is_fault: whether something is broken.
    """

    topic: str
    name: str
    value: str
    is_fault: bool = False


def examine_here() -> list[Finding]:
    """Examine this environment: versions, extras, devices, attention, and where caches are kept.

    Returns:
        The findings by topic. Faults are a package that is missing or too old, another package with the import name
        ``gisting``, and attention whose result differs from the reference. A version outside the tested range is noted.
    """
    return [*_versions(), *_extras(), *_devices(), *_attention(), *_caches()]


def examine_path(path: str | Path) -> list[Finding]:
    """Find out what is at a path (a checkpoint, an adapter, a store or a cache file) and check that it is intact.

    Args:
        path: a directory, a file, or a repository on the Hugging Face hub, from which only configuration and tokenizer
            are fetched, no weights.

    Returns:
        The findings. Faults are a model that cannot be gisted, and files that are missing or damaged.
    """
    from gisting.store.index import INDEX

    path = Path(local(path)) if Path(local(path)).exists() else path
    if isinstance(path, Path) and path.is_file():
        return list(_cache_file(path))
    if isinstance(path, Path) and (path / INDEX).is_file():
        return list(_store(path))
    return list(_checkpoint(path))


# -- this environment --------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "gisting", f"{__version__}, in {Path(__file__).parent}")
    yield from _namesakes()
    try:
        # Python is not a package, so it is not among the requirements.
        wanted = [("python", metadata.metadata(_DISTRIBUTION)["Requires-Python"]), *requirements(_DISTRIBUTION)]
    except metadata.PackageNotFoundError:
        yield Finding("versions", "packages", "unknown, because gisting runs from a folder and is not installed")
        wanted = [(name, "") for name in ("python", "torch", "transformers")]
    for name, specifier in wanted:
        needed, found = f"{name}{specifier}", _version(name)
        if found is None:
            yield Finding("versions", name, f"not installed; run: pip install '{needed}'", is_fault=True)
        elif is_version_in(specifier, found):
            yield Finding("versions", name, _noted(name, found))
        else:
            advice = "run gisting with a newer Python" if name == "python" else f"run: pip install '{needed}'"
            yield Finding("versions", name, f"{found}, but gisting needs {needed}; {advice}", is_fault=True)


def _namesakes() -> Iterator[Finding]:
    """Find installed packages named ``gisting`` that own files in the folder ``gisting``, as ours does."""
    for other in metadata.distributions(name="gisting"):
        # An editable install owns no files there, such as one of this package under its former name.
        if any(line.startswith("gisting/") for line in (other.read_text("RECORD") or "").splitlines()):
            message = (
                f"{other.version}, an unrelated package with the same import name: installing or removing it replaces "
                f"or deletes files of {_DISTRIBUTION}; run: pip uninstall -y gisting && pip install "
                f"--force-reinstall --no-deps {_DISTRIBUTION}"
            )
            yield Finding("versions", "package named gisting", message, is_fault=True)


def _noted(name: str, version: str) -> str:
    """Add a note to a version outside the tested range."""
    note = untested(name, version)
    return version if note is None else f"{version} ({note})"


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        try:
            wanted = requirements(_DISTRIBUTION, extra)
        except metadata.PackageNotFoundError:
            return
        parts, missing, is_fault = [], [], False
        for name, specifier in wanted:
            found = _version(name)
            if found is None:
                missing.append(name)
            elif is_version_in(specifier, found):
                parts.append(f"{name} {_noted(name, found)}")
            else:
                parts.append(f"{name} {found} (gisting needs {name}{specifier})")
                # On a CUDA device impl="auto" chooses the kernels by default.
                is_fault |= extra == "kernels"
        if missing:
            parts.append(f"{', '.join(missing)} missing: pip install 'gist-tokens[{extra}]'")
        yield Finding("extras", extra, f"{', '.join(parts) or 'not for this platform'} ({purpose})", is_fault)


def _version(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    yield Finding(
        "devices", "cpu", f"{os.cpu_count()} cores, {platform.machine()}, torch's threads: {torch.get_num_threads()}"
    )
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding(
            "devices",
            f"cuda:{number}",
            f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB",
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda or (torch.version.hip and f"ROCm {torch.version.hip}")
        why = f"torch is built for {built}, but finds no device" if built else "torch is built without CUDA"
        yield Finding("devices", "cuda", f"none: {why}")


def _attention(head_size: int = _HEAD_SIZE, *, has_softcap: bool = False) -> Iterator[Finding]:
    """Find what ``impl="auto"`` chooses on every device, and compare its result with the reference."""
    for device in ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]:
        for dtype in _DTYPES:
            name = f"{device}, {str(dtype).removeprefix('torch.')}"
            try:
                q = _noise(head_size).to(device, dtype)
                softcap = 30.0 if has_softcap else None
                impl, reason = choose_implementation(q, q, head_size**-0.5, has_softcap=has_softcap)
                is_gist = torch.zeros((1, q.shape[2]), dtype=torch.bool, device=device)
                is_gist[:, 20:22] = True
                found, expected = (
                    interval_attention(q, q, q, gist_visibility(is_gist), softcap=softcap, impl=how).float()
                    for how in ("auto", "reference")
                )
            except _DAMAGE as error:
                yield Finding("attention", name, f"fails: {_first_line(error)}", is_fault=True)
                continue
            difference = float((found - expected).abs().max())
            # The reference rounds once, at the end. Allow eight rounding errors.
            is_right = difference <= 8 * torch.finfo(dtype).eps * float(expected.abs().max())
            says = "agrees with the reference" if is_right else f"differs from the reference by {difference:.1e}"
            yield Finding("attention", name, f"{impl}, {says}; {reason}", is_fault=not is_right)


def _noise(head_size: int) -> Tensor:
    return torch.randn((1, 2, 48, head_size), generator=torch.Generator().manual_seed(0))


def _caches() -> Iterator[Finding]:
    from huggingface_hub import constants

    hub = f"{constants.HF_HUB_CACHE}{', offline (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else ''}"
    yield Finding("caches", "models from the hub", hub)
    kernels = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    yield Finding("caches", "compiled kernels", kernels)
    yield Finding("caches", "gists", "only in the files and stores that you name")


# -- a path ------------------------------------------------------------------------------------------------------------


def _cache_file(path: Path) -> Iterator[Finding]:
    from gisting.cache import GistCache

    try:
        cache = GistCache.load(path)
    except _DAMAGE as error:
        yield Finding("cache file", "states", _first_line(error), is_fault=True)
        return
    counts = cache.num_gist_tokens
    shown = ", ".join(map(str, counts)) if len(counts) <= 8 else f"{min(counts)} to {max(counts)}"
    yield Finding("cache file", "prompts", f"{len(cache)}, with {shown} gist tokens")
    by = f"{cache.origin.checkpoint}, " if cache.origin.checkpoint else ""
    yield Finding("cache file", "made by", f"{by}model {cache.origin.model}, tokenizer {cache.origin.tokenizer}")
    yield Finding("cache file", "template", f"{cache.origin.template}, condition {cache.origin.condition}")
    yield Finding("cache file", "states", f"intact: {cache.num_bytes:,} bytes, {cache.dtype}")


def _store(path: Path) -> Iterator[Finding]:
    from gisting.store import GistStore
    from gisting.store.index import some_of

    try:
        with GistStore(path, is_read_only=True) as store:
            entries, faults = store.list(), store.verify()
    except _DAMAGE as error:
        yield Finding("store", "index", _first_line(error), is_fault=True)
        return
    size = sum({entry.key: entry.num_bytes for entry in entries}.values())
    yield Finding("store", "entries", f"{len(entries):,}, in files of {size:,} bytes")
    makers: dict[str, list[StoreEntry]] = {}
    for entry in entries:
        by = f"{entry.checkpoint}, " if entry.checkpoint else ""
        makers.setdefault(f"{by}model {entry.model}", []).append(entry)
    for maker, made in makers.items():
        days = sorted({entry.created[:10] for entry in made})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        names = [entry.name for entry in made if entry.name is not None]
        shown = f": {some_of(names)}" if names else ""
        yield Finding("store", "made by", f"{maker}: {len(made):,} of {when}{shown}")
    for fault in faults:
        advice = "gisting store gc deletes it" if fault.is_harmless else "compress it again"
        yield Finding("store", fault.kind, f"{fault.message}; {advice}", is_fault=not fault.is_harmless)
    if not faults:
        yield Finding("store", "files", "all intact")


def _checkpoint(name: str | Path) -> Iterator[Finding]:
    from gisting.models.adapters import read_about
    from gisting.models.registry import family_of, position_limit, read_config

    try:
        about = read_about(name)
        is_adapter = about is not None and not _has(name, "config.json")
        base = about["base"] if is_adapter and about is not None else name
        config = read_config(base)
    except _DAMAGE as error:
        message = f"{name} is not a readable checkpoint, store or cache file: {_first_line(error)}"
        yield Finding("checkpoint", "configuration", message, is_fault=True)
        return
    if is_adapter:
        yield Finding("checkpoint", "adapter of", str(base))
    try:
        family_of(config)
        limit = position_limit(config)
        ends = "" if limit is None else f", up to {limit:,} positions"
        yield Finding("checkpoint", "family", f"{config.model_type}{ends}")
    except GistError as error:
        yield Finding("checkpoint", "family", _first_line(error), is_fault=True)
        return
    weights = _tried("checkpoint", "weights", lambda: _weights(name, is_adapter=is_adapter))
    yield weights
    if isinstance(name, Path) and not is_adapter and not weights.is_fault:
        yield from _exactness(name, config)
    gist = getattr(config, "gist", None)
    if is_adapter or gist is not None:
        yield from _gists(name, config, gist)
    else:
        yield Finding("checkpoint", "gist token", "none: gisting.load adds one, which the model must learn by training")
    head_size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    yield from _attention(head_size, has_softcap=getattr(config, "attn_logit_softcapping", None) is not None)


def _exactness(name: Path, config: Any) -> Iterator[Finding]:
    """Say whether gists are exact in a checkpoint, as its config says or as a check finds."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from gisting.models.check import check_model, kept_proof

    kept = kept_proof(config)
    if kept is not None:
        value = f"exact, as checked with torch {kept['torch']} and transformers {kept['transformers']}"
        yield Finding("checkpoint", "gists", value)
        return
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        found = check_model(_silently(lambda: auto.from_pretrained(name)))
    except _DAMAGE as error:
        yield Finding("checkpoint", "gists", _first_line(error), is_fault=True)
        return
    for one in found.comparisons:
        yield Finding("checkpoint", f"gists: {one.name}", str(one), is_fault=not one.passed)


def _gists(name: str | Path, config: Any, gist: dict[str, Any] | None) -> Iterator[Finding]:
    from gisting.models.state import PATCH_FORMAT
    from gisting.tokens import GistTokenizer

    if gist is not None and gist.get("format") != PATCH_FORMAT:
        message = f"format {gist.get('format')}, this version reads {PATCH_FORMAT}: pip install -U gist-tokens"
        yield Finding("checkpoint", "patch", message, is_fault=True)
    try:
        tokenizer = GistTokenizer.from_pretrained(name)
        fingerprint, _ = tokenizer.fingerprint, tokenizer.eos_token_id
    except _DAMAGE as error:
        yield Finding("checkpoint", "tokenizer", _first_line(error), is_fault=True)
        return
    token = tokenizer.gist_token_id
    if gist is not None and gist.get("tokenizer") != fingerprint:
        message = f"is {fingerprint}, but the model was patched for {gist.get('tokenizer')}; save both together again"
        yield Finding("checkpoint", "tokenizer", message, is_fault=True)
    else:
        yield Finding("checkpoint", "tokenizer", fingerprint)
    is_outside = gist is not None and token >= config.vocab_size
    says = f"id {token}" + (f", but the model has {config.vocab_size:,} rows" if is_outside else "")
    yield Finding("checkpoint", "gist token", says, is_fault=is_outside)
    yield Finding("checkpoint", "template", tokenizer.template.name)
    trained = (gist or {}).get("num_gist_tokens")
    low, high = trained or (None, None)
    says = "not recorded: give -k" if low is None else f"{low}" if low == high else f"{low} to {high}"
    yield Finding("checkpoint", "gist tokens trained", says)
    chunk_length = (gist or {}).get("chunk_length")
    if chunk_length is not None:
        yield Finding("checkpoint", "chunks", f"of {chunk_length:,} prompt tokens")


def _weights(name: str | Path, *, is_adapter: bool) -> str:
    """Describe the weight files, after checking that the header of each fits its size and that no weight is missing.

    Raises:
        GistError: a file is missing or damaged, or the files lack a weight of the model or have it in another shape.
    """
    from safetensors import SafetensorError, safe_open

    from gisting.models.adapters import read_about, weights_name

    if not isinstance(name, Path):
        return "on the hub, not fetched"
    about = read_about(name) if is_adapter else None
    if about is not None:
        files = [name / weights_name(about)]
    else:
        files = weight_files(name) or [name / "model.safetensors"]
    if files[0].suffix == ".bin":
        return f"{len(files)} .bin files, which are not examined"
    num_tensors, num_bytes = 0, 0
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                num_tensors += len(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise GistError(f"{file.name} is missing or damaged ({error}); fetch the checkpoint again") from error
        num_bytes += file.stat().st_size
    if not is_adapter:
        _check_names(name)
    where = files[0].name if len(files) == 1 else f"{len(files)} files"
    return f"{num_tensors:,} tensors in {where}, {num_bytes:,} bytes"


def _check_names(name: Path) -> None:
    """Raise if a weight of the model is in none of its files, or in another shape. Reads their headers alone."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from gisting.models.load import describe_missing
    from gisting.models.registry import read_config

    auto: Any = AutoModelForSeq2SeqLM if read_config(name).is_encoder_decoder else AutoModelForCausalLM
    settings: Any = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    _, about = _silently(lambda: auto.from_pretrained(name, **settings))
    fault = describe_missing(about)
    if fault is not None:
        raise GistError(fault)
    for weight, held, wanted in about["mismatched_keys"]:
        raise GistError(
            f"{weight} is {tuple(held)} in the files and {tuple(wanted)} in config.json; fetch the checkpoint again"
        )


def _silently(load: Callable[[], Any]) -> Any:
    """Load without what transformers prints, a table of what is reported here in a line."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load()
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _has(name: str | Path, file: str) -> bool:
    return (Path(name) / file).is_file()


def _tried(topic: str, name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(topic, name, look())
    except _DAMAGE as error:
        return Finding(topic, name, _first_line(error), is_fault=True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
