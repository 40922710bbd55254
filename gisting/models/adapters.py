"""Attach adapters to a frozen model, detach them, save and load them.

Place in the flow: patch -> **adapters** -> training, or what ``load`` finds in a directory. A model with an adapter is
still the ``PreTrainedModel`` that was patched, so it works everywhere: ``compress``, ``generate``, ``fingerprint``,
``unpatch``. peft implements LoRA, and reads the files of the kinds that it can apply; ``gist_lora`` finds the gist
tokens. Training is elsewhere.

There are three kinds. Each has its own embedding rows for gist tokens, because an untrained row carries no information:

- ``lora``: LoRA (arXiv 2106.09685) on every linear layer except the head and, where experts share one tensor, the dense
  layers beside them, at every token; one row. Plain peft reads it completely. The adapted model also answers text
  without gist tokens.
- ``gist-lora``: LoRA on the same layers of the stack that reads the prompt, with its update added at gist tokens
  only; a row for each position in a gist (one for all in adapters of earlier versions). Its files do not have peft's
  names, because plain peft, and all that loads peft's files (transformers, servers), would apply it at every token
  without a word, which is a different model from the trained one.
- ``embeddings``: a row for each position in a gist, and nothing else. Plain peft reads them as trained tokens.

The rows act through a hook, so the model's embedding table keeps its bits and no output logit changes.
:func:`gist_rows` returns them as plain token embeddings: written to free rows of an unpatched model's table, row j for
the j-th gist token, they give the same states under the same mask.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gisting.cache import GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.models import gist_lora
from gisting.models.fingerprint import base_fingerprint, fingerprint
from gisting.models.state import guarded_stack, is_patched
from gisting.models.weights import input_weight
from gisting.source import find_file
from gisting.tokens import GistTokenizer

__all__ = [
    "KINDS",
    "Adapter",
    "adapter_of",
    "attach",
    "check_directory",
    "check_num_gist_tokens",
    "checkpoint_name",
    "detach",
    "for_base_model",
    "gist_rows",
    "load",
    "most_gist_tokens",
    "read_about",
    "reader_fingerprint",
    "save",
    "weights_name",
    "without_adapter",
]

#: The kinds of adapter, by name.
KINDS = ("lora", "gist-lora", "embeddings")

# Format 2 is that of gist-lora, whose weights are in no file of peft's name. Format 1, that of the other kinds and of
# gist-lora in earlier versions, has peft's names.
_FORMATS = (1, 2)
_FILE, _OWN_WEIGHTS = "gist_adapter.json", "gist_adapter.safetensors"
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
_NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """The settings of an adapter for a frozen model.

    Args:
        kind: one of :data:`KINDS`.
        num_rows: number of embedding rows: for ``"embeddings"`` and ``"gist-lora"`` one for each position in a gist, so
            the largest k, or 1 for all positions; for ``"lora"`` 1.
        rank: rank of LoRA's two matrices.
        alpha: LoRA's scale times ``rank``; None for twice the rank.
        dropout: the dropout on LoRA's input during training.

    Raises:
        GistError: the kind is unknown, or a number is out of range.
    """

    kind: str
    num_rows: int = 1
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GistError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.num_rows < 1 or self.rank < 1:
            raise GistError(f"num_rows and rank must be at least 1, got {self.num_rows} and {self.rank}")
        if self.num_rows > 1 and not self.is_gist_only:
            raise GistError(
                f"num_rows must be 1 for {self.kind}, got {self.num_rows}; only embeddings and gist-lora take more"
            )

    @property
    def has_lora(self) -> bool:
        """Whether the adapter wraps linear layers."""
        return self.kind != "embeddings"

    @property
    def is_gist_only(self) -> bool:
        """Whether it acts at gist tokens only; the base model then computes ordinary text and what follows a cache."""
        return self.kind != "lora"


def attach(model: Any, adapter: Adapter) -> None:
    """Freeze a patched model and attach a new adapter, in place. :func:`detach` undoes it.

    A new adapter changes nothing: its rows start as copies of the gist token's row, and LoRA's second matrix as zeros.
    Only the further rows of ``gist-lora`` start apart from it, by noise of the spread of the embedding table: tokens
    with equal rows under the same LoRA learn to hold the same, so that a longer gist would carry no more than a short
    one. Trained tensors are float32 even if the model is in 16 bits.

    Args:
        model: a patched model without adapters.
        adapter: the settings of the adapter.

    Raises:
        GistError: the model is not patched, or already has an adapter.
        ImportError: peft is not installed (``pip install 'gist-tokens[train]'``).
    """
    if not is_patched(model):
        raise GistError(f"model ({type(model).__name__}) is not patched; call gisting.patch(model, tokenizer) first")
    gist = model.config.gist
    if adapter_of(model) is not None or getattr(model, "peft_config", None):
        raise GistError(
            "model already has an adapter; remove it with gisting.models.adapters.detach, or load the model again"
        )
    model._gist_trained_before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    stack: Any = guarded_stack(model)
    row = input_weight(model).detach()[gist["gist_token_id"]]
    if adapter.has_lora:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_peft_config(model, adapter), model, _NAME)
        model._hf_peft_config_loaded = True
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = _at_least_float32(parameter.data)
    if adapter.kind == "gist-lora":
        for module in stack.modules():
            if hasattr(module, "lora_variant"):
                module.lora_variant[_NAME] = gist_lora.GistOnlyLora()
    rows = nn.Parameter(_at_least_float32(row).repeat(adapter.num_rows, 1))
    if adapter.kind == "gist-lora" and adapter.num_rows > 1:
        spread = input_weight(model).detach().float().std(0).to(rows)
        with torch.no_grad():
            rows[1:] += torch.randn(rows[1:].shape).to(rows) * spread  # drawn on the CPU: the same on every device
    gist_lora.install(model, stack, rows, has_lora=adapter.kind == "gist-lora")
    model.config.gist = {**gist, "adapter": asdict(adapter)}


def detach(model: Any) -> None:
    """Remove the adapter from ``model`` and restore exactly what :func:`attach` found.

    Args:
        model: a model with an adapter.

    Raises:
        GistError: the model has no adapter of this library.
    """
    if adapter_of(model) is None:
        raise GistError("model has no gisting adapter; there is nothing to remove")
    gist_lora.uninstall(model)
    wrapped = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_variant")]
    for name, module in wrapped:
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, module.base_layer)
    if wrapped:
        del model.peft_config
        model._hf_peft_config_loaded = False
    before = set(model._gist_trained_before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    del model._gist_trained_before
    vars(model).pop("_gist_adapter_name", None)
    model.config.gist = {key: value for key, value in model.config.gist.items() if key != "adapter"}


@contextmanager
def without_adapter(model: Any) -> Iterator[Any]:
    """Switch the LoRA of ``model`` off within a block, without detaching it.

    Ordinary text is then read by the frozen base model. Adapters of the other kinds do nothing there anyway.

    Args:
        model: a model with an adapter. No other thread may use it meanwhile.

    Yields:
        The model.

    Raises:
        GistError: the model has no adapter.
    """
    if adapter_of(model) is None:
        raise GistError("model has no gisting adapter that could be switched off")
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_variant")]
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in before.items():  # peft stops and starts gradients with the adapter
            parameter.requires_grad_(is_trained)


def adapter_of(model: Any) -> Adapter | None:
    """Return the settings of the adapter on ``model``, or None if it has none.

    Args:
        model: any model.
    """
    # Not decided by the config alone, because the config of a training checkpoint also names an adapter.
    return Adapter(**model.config.gist["adapter"]) if hasattr(model, "_gist_trained_before") else None


def gist_rows(model: Any) -> Tensor:
    """Return the rows that the adapter uses as embeddings of gist tokens, ``(num_rows, d_model)``.

    They have the dtype and the scale of the model's embedding table.

    Args:
        model: a model with an adapter.

    Raises:
        GistError: the model has no adapter.
    """
    if adapter_of(model) is None:
        raise GistError("model has no adapter; its gist token's row is in its embedding table")
    return guarded_stack(model).gist_rows.detach()


def reader_fingerprint(model: Any) -> str:
    """Return the fingerprint in the caches that ``model`` makes: that of the model which continues from them.

    After a cached gist, an adapter that acts at gist tokens only does nothing, so the base model continues from the
    states with the same bits, patched or stock, in ``generate`` or in a server. Caches of such adapters are therefore
    the base model's (:func:`~gisting.models.fingerprint.base_fingerprint`); those of several adapters can be joined
    (``GistCache.cat``) and answered in one batch. All other caches belong to the model that made them.

    Args:
        model: a patched model.
    """
    adapter = adapter_of(model)
    return base_fingerprint(model) if adapter is not None and adapter.is_gist_only else fingerprint(model)


def checkpoint_name(model: Any) -> str:
    """Return what people call a model: where it or its adapter was loaded from, "" if it was not loaded.

    A directory is named by its last two parts, so that nothing else of this computer gets into a file.

    Args:
        model: any model.
    """
    adapter, name = adapter_of(model), str(getattr(model.config, "_name_or_path", "") or "")
    name = getattr(model, "_gist_adapter_name", name)
    if os.path.isdir(name):
        name = "/".join(Path(name).resolve().parts[-2:])
    if adapter is not None and not hasattr(model, "_gist_adapter_name") and name:
        name = f"{name} with {adapter.kind}"
    return "".join(character if character.isprintable() else "?" for character in name)


def for_base_model(model: Any, cache: GistCache) -> GistCache:
    """Relabel a cache of an earlier version so that the base model accepts it; ``compress`` now makes it so at once.

    Args:
        model: the model with the adapter that made the cache.
        cache: the result of ``compress`` with this model. It is not changed; the states are shared.

    Returns:
        A cache for the base model.

    Raises:
        GistError: the model has no adapter that acts at gist tokens only.
        CacheMismatchError: another model made the cache.
    """
    adapter = adapter_of(model)
    if adapter is None or not adapter.is_gist_only:
        raise GistError(
            f"model has {'no adapter' if adapter is None else 'a lora adapter'}, so only the model itself can use its "
            "caches; the base model can use those of adapters that act at gist tokens only (gist-lora, embeddings)"
        )
    base, own = reader_fingerprint(model), fingerprint(model)
    if cache.origin.model not in (base, own):
        raise CacheMismatchError(f"cache was made for {cache.origin.model}, this model is {own}; compress it again")
    return replace(cache, origin=replace(cache.origin, model=base))


def most_gist_tokens(model: Any) -> int | None:
    """Return the most tokens that a gist can have: the rows of an adapter with one for each token; None for any number.

    Args:
        model: any model.
    """
    adapter = adapter_of(model)
    if adapter is None or (adapter.kind != "embeddings" and adapter.num_rows == 1):
        return None
    return adapter.num_rows


def check_num_gist_tokens(model: Any, num_gist_tokens: int) -> None:
    """Check that an adapter with a row for each token of a gist has enough. One with a single row takes any length.

    Args:
        model: any model.
        num_gist_tokens: the length of the gist.

    Raises:
        GistError: the gist is longer than the number of rows.
    """
    most = most_gist_tokens(model)
    if most is not None and num_gist_tokens > most:
        raise GistError(
            f"num_gist_tokens must be at most {most}, got {num_gist_tokens}: the adapter has {most} rows, one for each "
            "token of a gist; train it with more"
        )


def save(model: Any, tokenizer: GistTokenizer, directory: str | Path) -> None:
    """Write the adapter, and ``gist_adapter.json``, which describes it: as files that peft reads, except gist-lora.

    In peft's files the rows are trained tokens: the first has the gist token's id, any others have ids after all ids of
    the tokenizer. An embedding table that takes them must have enough rows. The weights of gist-lora have the same
    names in ``gist_adapter.safetensors``; files of an earlier version in peft's names are removed.

    Args:
        model: a model with an adapter.
        tokenizer: the tokenizer it was patched for; it is not written.
        directory: where to write; created if it does not exist.

    Raises:
        GistError: the model has no adapter, or the directory holds a complete checkpoint, which would be loaded in
            place of the adapter.
        OSError: something cannot be written.
    """
    from peft import TrainableTokensConfig, get_peft_model_state_dict

    adapter = adapter_of(model)
    if adapter is None:
        raise GistError("model has no adapter to save")
    directory = Path(directory)
    check_directory(directory)
    first, size = tokenizer.gist_token_id, len(tokenizer.tokenizer)  # pyright: ignore[reportArgumentType]
    ids = [first, *range(max(first + 1, size), max(first + 1, size) + adapter.num_rows - 1)]
    (embedding,) = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    base = _base(model)
    if adapter.has_lora:
        config: Any = _peft_config(model, adapter)
        config.trainable_token_indices = {embedding: ids}
        held = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
        name = f"{embedding}.token_adapter.trainable_tokens_delta"
    else:
        config = TrainableTokensConfig(token_indices=ids, target_modules=[embedding])
        held, name = {}, f"{embedding}.trainable_tokens_delta"
    config.base_model_name_or_path, config.inference_mode = base, True
    tensors = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in held.items()}
    tensors[_PREFIX + name] = gist_rows(model).cpu().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    is_for_peft = adapter.kind != "gist-lora"
    if is_for_peft:
        config.save_pretrained(str(directory))
    save_file(tensors, directory / (_PEFT_WEIGHTS if is_for_peft else _OWN_WEIGHTS), metadata={"format": "pt"})
    about = {
        "format": 1 if is_for_peft else 2,
        "base": base,
        "rows": _PREFIX + name,
        "num_gist_tokens": model.config.gist.get("num_gist_tokens"),
        "adapter": asdict(adapter),
    }
    (directory / _FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    # Last, so that a save that fails leaves the earlier adapter as it was.
    stale = (_OWN_WEIGHTS,) if is_for_peft else (_PEFT_CONFIG, _PEFT_WEIGHTS)
    for file in stale:
        (directory / file).unlink(missing_ok=True)


def load(model: Any, name_or_path: str | Path, **source: Any) -> None:
    """Attach what :func:`save` wrote to a patched model, which should be the base model that it was trained for.

    Args:
        model: a patched model without adapters.
        name_or_path: a directory, or a repository on the Hugging Face hub.
        **source: where files come from: ``revision``, ``token``, ...

    Raises:
        GistError: no adapter of this library is there, it has a later format, or it does not fit the model.
    """
    about = read_about(name_or_path, **source)
    if about is None:
        raise GistError(f"{name_or_path} holds no gisting adapter: it has no {_FILE}")
    weights = find_file(name_or_path, weights_name(about), **source)
    if weights is None:
        raise GistError(f"{name_or_path} has {_FILE} but no {weights_name(about)}; fetch it again")
    tensors = load_file(weights)
    attach(model, Adapter(**about["adapter"]))
    own = {re.sub(rf"\.{_NAME}(?=\.|$)", "", name): tensor for name, tensor in _trained(model).items()}
    found = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if key != about["rows"]}
    if about["rows"] in tensors:
        found["gist_rows"] = tensors[about["rows"]]
    odd = [name for name in own.keys() | found.keys() if _shape(own.get(name)) != _shape(found.get(name))]
    if odd:
        layers, untouched = sorted({_layer(name) for name in odd}), _untouched(model)
        detach(model)
        advice = f"it was trained for the base model {about['base']}"
        if all(layer in untouched for layer in layers):
            advice = f"made by an earlier version, which also adapted {', '.join(layers)}; train it again"
        raise GistError(f"{name_or_path} does not fit {type(model).__name__}: {', '.join(sorted(odd)[:3])}; {advice}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    model._gist_adapter_name = str(name_or_path)
    if about["num_gist_tokens"] is not None:
        model.config.gist = {**model.config.gist, "num_gist_tokens": about["num_gist_tokens"]}


def read_about(name_or_path: str | Path, **source: Any) -> dict[str, Any] | None:
    """Read ``gist_adapter.json``, whose ``base`` names the base model.

    Args:
        name_or_path: a directory, or a repository on the hub.
        **source: where on the hub, as for ``from_pretrained``: ``revision``, ``token``, ...

    Returns:
        The contents, or None if there is no such file.

    Raises:
        GistError: the file has a later format, or is damaged.
    """
    found = find_file(name_or_path, _FILE, **source)
    if found is None:
        return None
    try:
        about = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GistError(f"{found} is damaged ({error}); get the adapter again") from error
    if not isinstance(about, dict) or not isinstance(about.get("base", ""), str):
        raise GistError(f"{found} is damaged: it names no base model; get the adapter again")
    if about.get("format") not in _FORMATS:
        raise GistError(
            f"{found} has format {about.get('format')}, this version reads {' and '.join(map(str, _FORMATS))}; upgrade "
            "gisting: pip install -U gist-tokens"
        )
    return about


def weights_name(about: Mapping[str, Any]) -> str:
    """Return the name of the file with an adapter's weights.

    Args:
        about: what :func:`read_about` returned.
    """
    return _OWN_WEIGHTS if about["format"] == 2 else _PEFT_WEIGHTS


def check_directory(directory: str | Path) -> None:
    """Check that ``directory`` holds no complete checkpoint, which would be loaded in place of an adapter.

    Args:
        directory: where an adapter will be written.

    Raises:
        GistError: it holds one.
    """
    if (Path(directory) / "config.json").exists():
        raise GistError(
            f"{directory} holds a whole checkpoint, which would be loaded in place of the adapter; give "
            "another directory"
        )


def _trained(model: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors by name. The rows are called ``gist_rows``, wherever their stack is in the model."""
    found = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    return {**found, "gist_rows": guarded_stack(model).gist_rows}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Make a copy in float32 or wider, because 16 bits lose AdamW's small steps."""
    return tensor.float() if tensor.element_size() < 4 else tensor.clone()


def _peft_config(model: Any, adapter: Adapter) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank if adapter.alpha is None else adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=_targets(model, adapter),
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )


def _targets(model: Any, adapter: Adapter) -> list[str]:
    """Name every linear layer except the head and those beside experts, by short names if those select the same layers.

    Gist-only LoRA takes only the stack that reads the prompt, because the decoder of an encoder-decoder never sees gist
    tokens.
    """
    head = model.get_output_embeddings()
    taken = _untouched(model)
    linear = [
        (re.sub(r"\.base_layer$", "", name), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and "lora_" not in name
        and name.rpartition(".")[2] not in taken
    ]
    inside = {id(module) for module in (guarded_stack(model) if adapter.kind == "gist-lora" else model).modules()}
    wanted = [name for name, module in linear if id(module) in inside]
    short = {name.rpartition(".")[2] for name in wanted}
    is_enough = all(name.rpartition(".")[2] not in short for name, _ in linear if name not in wanted)
    return sorted(short) if is_enough else sorted(wanted)


def _untouched(model: Any) -> tuple[str, ...]:
    """Name the dense layers that no adapter changes.

    Where experts share one tensor, peft takes these names for the experts, and would change them at every token.
    """
    is_fused = any(name.endswith(".gate_up_proj") for name, _ in model.named_parameters())
    return _NAMES_OF_EXPERTS if is_fused else ()


def _layer(name: str) -> str:
    """Return the short name of the layer that one of LoRA's matrices belongs to."""
    return name.partition(".lora_")[0].rpartition(".")[2]


def _base(model: Any) -> str:
    """Name the frozen model. A directory is given by its absolute path, because the adapter is in another directory."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return str(Path(name).resolve()) if name and os.path.isdir(name) else name
