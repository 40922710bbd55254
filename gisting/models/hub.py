"""Patched checkpoints as directories and on the Hugging Face hub; the way back is ``gisting.load``.

Place in the flow: behind training. Puts together what a checkpoint consists of: the weights and config that
transformers writes, the tokenizer with its gist token and template, a card. Knows how a folder is uploaded; measures
nothing, and loads nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisting.card import card as make_card
from gisting.card import is_repository_id
from gisting.errors import GistError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gisting.tokens import GistTokenizer

__all__ = ["push_to_hub", "save_pretrained", "upload"]

# A checkpoint that is cut into other files than the one before it leaves none of them behind.
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# What the card says of an adapter.
_ADAPTERS = {
    "lora": "These files are a LoRA adapter, in peft's layout, with the gist token's row of embedding.",
    "gist-lora": "These files are a gist-only LoRA adapter: its update acts at gist tokens alone, and text without "
    "them is answered by the base model, to the bit. The layout is peft's, but plain peft would apply it at all "
    "tokens: load it with gisting.",
    "embeddings": "These files are an adapter of embeddings, a row for each place in a gist, in peft's layout of "
    "trained tokens.",
}


def save_pretrained(
    model: PreTrainedModel, tokenizer: GistTokenizer, directory: str | Path, *, title: str | None = None, **card: Any
) -> None:
    """Write a checkpoint that :func:`gisting.load` reads, and stock transformers without gisting too.

    Of a model with an adapter (:mod:`gisting.models.adapters`), the adapter alone, which names its base model.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        directory: where to; made where there is none. A checkpoint in it is replaced.
        title: of the card, ``README.md``; None for the directory's name.
        **card: ``data``, ``metrics``, ``license``, ``base_model`` and ``extra`` of :func:`gisting.card.card`. What is
            not given is not in the card, or said to be unknown.

    Raises:
        GistError: the model is not patched for this tokenizer, has adapters of another maker that are not merged, or
            ``directory`` is a file or, for an adapter, holds a whole checkpoint.
        OSError: something cannot be written.
    """
    from gisting.models import adapters
    from gisting.models.fingerprint import fingerprint
    from gisting.models.load import trained_num_gist_tokens
    from gisting.models.patch import require_patched

    require_patched(model, tokenizer)
    adapter = adapters.adapter_of(model)
    if adapter is None:
        _check_whole(model)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise GistError(f"directory must be a directory, {directory} is a file; give another path")
    trained = trained_num_gist_tokens(model)
    if adapter is not None:
        adapters.check_directory(directory)
        card = {**card, "extra": "\n\n".join(filter(None, [_ADAPTERS[adapter.kind], card.get("extra", "")]))}
    # Made first: a card that is refused leaves nothing behind.
    readme = make_card(
        "checkpoint",
        title=directory.resolve().name if title is None else title,
        num_gist_tokens=None if trained is None else range(trained[0], trained[1] + 1),
        template=tokenizer.template.name,
        model=f"{type(model).__name__}, {model.num_parameters():,} parameters, {fingerprint(model)}",
        **card,
    )
    if adapter is None:
        model.save_pretrained(directory)
    else:
        adapters.save(model, tokenizer, directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(readme, encoding="utf-8")


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
    """Upload what :func:`save_pretrained` writes; ``gisting.load(repo_id)`` is the way back.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        repo_id: ``"owner/name"``; made where there is none.
        private: whether a new repository can be read by its owner alone; None for the account's setting.
        revision: branch; None for the main one.
        token: access token; None for the one that is logged in.
        commit_message: what the commit is called.
        api: in place of :class:`huggingface_hub.HfApi`.
        **card: as for :func:`save_pretrained`.

    Returns:
        Where the commit is.

    Raises:
        GistError: as for :func:`save_pretrained`, or ``repo_id`` is no repository's.
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
            delete_patterns=_WEIGHTS,
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
    """Put a folder into a repository on the hub, as one commit; the repository is made where there is none.

    Args:
        folder: what is uploaded.
        repo_id: as for :func:`push_to_hub`, like ``private``, ``revision``, ``token``, ``commit_message``, ``api``.
        allow_patterns: which files are uploaded; None for all.
        delete_patterns: which files of the repository go, unless they are uploaded anew.

    Returns:
        Where the commit is.

    Raises:
        GistError: ``repo_id`` is no repository's.
        ConnectionError: the hub cannot be reached.
        OSError: it refuses; huggingface_hub says why.
    """
    # Of httpx or httpx2, whichever huggingface_hub is built on; of its own errors, only those are no OSError.
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
            f"{repo_id} was not uploaded, for the hub could not be reached ({error}); try again"
        ) from error
    return str(done.commit_url)


def _check_repository(repo_id: str) -> None:
    if not is_repository_id(repo_id):
        raise GistError(f"repo_id must be a repository on the hub, 'owner/name', got {repo_id!r}")


def _check_whole(model: Any) -> None:
    """transformers and peft write an adapter without the model that it belongs to."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise GistError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; merge its adapters first: "
            "model = model.merge_and_unload()"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise GistError(
            "model has adapters, which would be written without the model that they belong to; merge them first, with "
            "PeftModel.merge_and_unload() of peft"
        )
