"""Save patched checkpoints to directories and to the Hugging Face hub. ``gisting.load`` reads them.

Place in the flow: after training. A checkpoint consists of the weights and config that transformers writes, the
tokenizer with its gist token and template, and a card.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisting.card import card as make_card
from gisting.card import is_repository_id
from gisting.errors import GistError
from gisting.source import gists_among_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gisting.tokens import GistTokenizer

__all__ = ["check_complete", "checkpoint_card", "push_to_hub", "save_pretrained", "upload"]

_logger = logging.getLogger("gisting")
# Weight files of an earlier upload are deleted, because the new checkpoint may be split into other files.
# Of an earlier upload; the last would have peft apply a gist-only adapter at all tokens.
_STALE = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
# What the card says about an adapter.
_ADAPTERS = {
    "lora": "These files are a LoRA adapter with the gist token's embedding row. peft reads them, on the base model "
    "with one more embedding row.",
    "gist-lora": "These files are a gist-only LoRA adapter: its update acts at gist tokens only, and text without "
    "gist tokens gets exactly the base model's answers. Load it with gisting: the files do not have peft's names, "
    "because plain peft would apply it at all tokens.",
    "embeddings": "These files are an adapter of embeddings, a row for each token of a gist, in peft's layout of "
    "trained tokens.",
}


def save_pretrained(
    model: PreTrainedModel, tokenizer: GistTokenizer, directory: str | Path, *, title: str | None = None, **card: Any
) -> None:
    """Write a checkpoint that :func:`gisting.load` reads, and that stock transformers reads without gisting.

    If the model has an adapter (:mod:`gisting.models.adapters`), only the adapter is written, with the name of its base
    model.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        directory: where to write; created if it does not exist. A checkpoint in it is replaced. Caches of compressed
            prompts that lie in it are moved to its folder ``gists``, because vLLM and other servers load every
            ``*.safetensors`` file next to a checkpoint as weights.
        title: the title of the card, ``README.md``; None for the directory's name.
        **card: ``data``, ``metrics``, ``license``, ``base_model``, ``facts``, ``settings``, ``evaluations`` and
            ``extra`` of :func:`gisting.card.card`. The card leaves out what is not given, or says that it is not
            stated.

    Raises:
        GistError: the model is not patched for this tokenizer, it has unmerged adapters that are not this library's,
            ``directory`` is a file, or ``directory`` holds a complete checkpoint and the model has an adapter.
        OSError: something cannot be written.
    """
    # Load transformers, which uploading a store does without.
    from gisting.models import adapters
    from gisting.models.state import end_with, require_patched

    require_patched(model, tokenizer)
    adapter = adapters.adapter_of(model)
    if adapter is None:
        check_complete(model)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise GistError(f"directory must be a directory, but {directory} is a file; give another path")
    if adapter is not None:
        adapters.check_directory(directory)
    # Made first, so that nothing is written if an argument of the card is wrong.
    readme = checkpoint_card(model, tokenizer, directory.resolve().name if title is None else title, **card)
    if adapter is None:
        end_with(model.generation_config, tokenizer)  # Other settings may have replaced those that patch made.
        model.save_pretrained(directory)
    else:
        adapters.save(model, tokenizer, directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(readme, encoding="utf-8")
    _move_gists(directory)


def _move_gists(directory: Path) -> None:
    """Move caches of compressed prompts away from the weights of a checkpoint, and say where they are now."""
    for path in gists_among_weights(directory):
        target = directory / "gists" / path.name
        target.parent.mkdir(exist_ok=True)
        number = 1
        while target.exists():
            number += 1
            target = directory / "gists" / f"{number}.{path.name}"
        os.replace(path, target)
        _logger.warning(
            "%s lay among the weights of a checkpoint, where servers would load it; it is now %s", path, target
        )


def checkpoint_card(model: PreTrainedModel, tokenizer: GistTokenizer, title: str, **card: Any) -> str:
    """Make the card of a checkpoint: what the model itself says, and what else is given.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        title: as for :func:`gisting.card.card`.
        **card: as for :func:`save_pretrained`.

    Returns:
        The text of a README.md.

    Raises:
        GistError: as for :func:`gisting.card.card`.
    """
    from gisting.models import adapters
    from gisting.models.load import trained_num_gist_tokens

    adapter, trained = adapters.adapter_of(model), trained_num_gist_tokens(model)
    if adapter is not None:
        card = {**card, "extra": "\n\n".join(filter(None, [_ADAPTERS[adapter.kind], card.get("extra", "")]))}
    return make_card(
        "checkpoint",
        title=title,
        num_gist_tokens=None if trained is None else range(trained[0], trained[1] + 1),
        template=tokenizer.template.name,
        model=f"{type(model).__name__}, {model.num_parameters():,} parameters, {adapters.reader_fingerprint(model)}",
        **card,
    )


def push_to_hub(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model that gists",
    api: Any = None,
    **card: Any,
) -> str:
    """Upload what :func:`save_pretrained` writes. ``gisting.load(repo_id)`` reads it.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        repo_id: ``"owner/name"``; created if it does not exist.
        private: whether only its owner can read a new repository; None for the account's default.
        revision: the branch; None for the main branch.
        token: the access token; None for the one that is logged in.
        commit_message: the message of the commit.
        api: a replacement for :class:`huggingface_hub.HfApi`.
        **card: as for :func:`save_pretrained`.

    Returns:
        The URL of the commit.

    Raises:
        GistError: as for :func:`save_pretrained`, or ``repo_id`` is not the name of a repository.
        OSError: the hub cannot be reached, or refuses.
    """
    _check_repository(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, tokenizer, folder, title=repo_id, **card)
        return upload(
            folder,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            delete_patterns=_STALE,
            api=api,
        )


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str,
    allow_patterns: Sequence[str] | None = None,
    delete_patterns: Sequence[str] | None = None,
    api: Any = None,
) -> str:
    """Upload a folder to a repository on the hub in one commit. The repository is created if it does not exist.

    Args:
        folder: the folder to upload.
        repo_id: as for :func:`push_to_hub`.
        private: as for :func:`push_to_hub`.
        revision: as for :func:`push_to_hub`.
        token: as for :func:`push_to_hub`.
        commit_message: as for :func:`push_to_hub`.
        allow_patterns: patterns of the files to upload; None for all.
        delete_patterns: patterns of the files to delete from the repository unless they are uploaded again.
        api: as for :func:`push_to_hub`.

    Returns:
        The URL of the commit.

    Raises:
        GistError: ``repo_id`` is not the name of a repository.
        ConnectionError: the hub cannot be reached.
        OSError: the hub refuses; huggingface_hub says why.
    """
    # From httpx or httpx2, whichever huggingface_hub uses. It is the only error it raises that is not an OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    _check_repository(repo_id)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.create_repo(repo_id, private=private, token=token, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            token=token,
            commit_message=commit_message,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            delete_patterns=None if delete_patterns is None else list(delete_patterns),
        )
    except OSError:
        raise  # huggingface_hub's own: no permission, no token, offline mode
    except HTTPError as error:
        raise ConnectionError(
            f"{repo_id} was not uploaded because the hub could not be reached ({error}); try again"
        ) from error
    return str(done.commit_url)


def _check_repository(repo_id: str) -> None:
    if not is_repository_id(repo_id):
        raise GistError(f"repo_id must be a repository on the hub, 'owner/name', got {repo_id!r}")


def check_complete(model: Any) -> None:
    """Refuse a model with peft's adapters, whose weights would be written without their base or under peft's names.

    peft changes a model in place, so this includes the model inside a ``PeftModel``, also after ``merge_adapter()``.

    Args:
        model: the model to write.

    Raises:
        GistError: it has adapters, is no model of transformers, or is quantised in a way that no file keeps.
    """
    from transformers import PreTrainedModel

    from gisting.models.fingerprint import is_peft_layer

    if not isinstance(model, PreTrainedModel):
        raise GistError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; merge its adapters first: "
            "model = model.merge_and_unload()"
        )
    wrapped = [name for name, module in model.named_modules() if is_peft_layer(module)]
    if wrapped or getattr(model, "_hf_peft_config_loaded", False):
        where = f" (in {len(wrapped)} modules, {wrapped[0]} among them)" if wrapped else ""
        raise GistError(
            f"model has adapters of peft{where}, which gisting.load could not read back; merge them first, with "
            "peft's PeftModel.merge_and_unload(), and save the model that it returns"
        )
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_serializable():
        raise GistError(
            f"transformers cannot save weights quantised with {quantiser.quantization_config.quant_method.value}; "
            "train an adapter (lora or gist-lora), which is saved without them, or quantise in another way"
        )
