"""Keep every branch on a library version in one place, each with the condition for removing it.

Place in the flow: below everything. A module that depends on a version calls a function here, so this file is the list
of shims.
"""

import functools
import inspect
from importlib import metadata
from typing import Any

MIN_TRANSFORMERS = (5, 17)

#: Versions on which the tests were run: in CI, as constraints.txt pins them, and on an H100 (docs/how_to_gpu.md). For
#: Python only the minor version counts. The lowest supported versions are in pyproject.toml.
TESTED = {
    "CI": {"python": "3.11", "torch": "2.13.0", "transformers": "5.24.0", "triton": "3.7.1"},
    "H100": {"python": "3.12", "torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"},
}


def require_transformers() -> None:
    """Refuse transformers before 5.17, the first version in which T5 uses the attention interface.

    pip refuses such an environment itself, unless the package was installed with ``--no-deps``. Remove this when that
    is enough.

    Raises:
        ImportError: transformers is too old; the message says what to run.
    """
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < MIN_TRANSFORMERS:
        wanted = ".".join(map(str, MIN_TRANSFORMERS))
        raise ImportError(
            f"gisting needs transformers >= {wanted}, but found {transformers.__version__}; run: pip install "
            f"'transformers>={wanted}'"
        )


def is_version_in(specifier: str, version: str) -> bool:
    """Return whether a version satisfies a specifier, as ``pip install`` would. This is not a shim, so it stays.

    Args:
        specifier: such as ``">=2.11"``; an empty one allows every version.
        version: such as ``"2.13.0+cpu"``.
    """
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def requirements(distribution: str, extra: str = "") -> list[tuple[str, str]]:
    """Return what an installed distribution requires on this platform. This is not a shim, so it stays.

    Args:
        distribution: its name for pip.
        extra: one of its extras, for what that extra requires in addition; empty for what is always required.

    Returns:
        Name and specifier of each required package.

    Raises:
        importlib.metadata.PackageNotFoundError: the distribution is not installed.
    """
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, metadata.requires(distribution) or ()):
        marker = requirement.marker
        is_core = marker is None or marker.evaluate({"extra": ""})
        if is_core if not extra else not is_core and marker is not None and marker.evaluate({"extra": extra}):
            found.append((requirement.name, str(requirement.specifier)))
    return found


@functools.cache
def library_versions() -> dict[str, str]:
    """Return the versions of torch and transformers, on which a model's results depend. This is not a shim."""
    import torch
    import transformers

    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def untested(package: str, version: str) -> str | None:
    """Describe how a version lies outside the tested range. This is not a shim, so it stays.

    Args:
        package: such as ``"torch"``, or ``"python"``.
        version: such as ``"2.14.1+cu130"``; the part after the plus is ignored.

    Returns:
        A text such as ``"newer than 2.13.0, the newest that was tested"``; None for a version between the oldest and
        the newest in :data:`TESTED`, and for a package that is not in it.
    """
    from packaging.version import Version

    tested = sorted(Version(row[package]) for row in TESTED.values() if package in row)
    if not tested:
        return None
    oldest, newest = tested[0], tested[-1]
    # Only as precise as the table: Python 3.12.3 counts as 3.12.
    release = Version(version).release[: len(newest.release)]
    if release > newest.release:
        return f"newer than {newest}, the newest that was tested"
    if release < oldest.release:
        return f"older than {oldest}, the oldest that was tested"
    return None


@functools.cache
def cache_argument() -> str:
    """Return the name under which models and ``generate`` take a transformers cache and return it in their outputs.

    It is ``"cache"`` from transformers 5.24 on and ``"past_key_values"`` before. Remove this when 5.24 is the lowest
    supported version.
    """
    from transformers import GenerationMixin

    generating: Any = GenerationMixin
    names = inspect.signature(generating.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


def num_constraint_numbers(num_beams: int, num_return_sequences: int) -> int:
    """Return how many row numbers stock ``generate`` uses for one prompt when it calls a ``prefix_allowed_tokens_fn``.

    Beams share one number. Several samples have one each before transformers 5.24, and share one from then on. Remove
    this when 5.24 is the lowest supported version.

    Args:
        num_beams: the argument of ``generate``.
        num_return_sequences: the argument of ``generate``.
    """
    import transformers

    if is_version_in(">=5.24", transformers.__version__):
        return 1
    return max(num_beams, num_return_sequences) // num_beams


def activation_checkpointing(enabled: bool) -> dict[str, bool]:
    """Return the argument of ``TrainingArguments`` for activation checkpointing, under its name in this transformers.

    ``gradient_checkpointing`` is deprecated in favour of ``activation_checkpointing``. Remove this when the lowest
    supported version has the new name.

    Args:
        enabled: whether to save memory at the cost of time.
    """
    from dataclasses import fields

    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": enabled}


def pipeline_settings(pipeline: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a transformers pipeline would pass to ``generate`` for a call with these settings.

    Until about 5.17 a pipeline kept one ``generation_config``; now it makes the arguments for each call. Remove this
    when the lowest supported version does so.

    Args:
        pipeline: a pipeline of transformers.
        settings: the settings of the call, in addition to the pipeline's own.
    """
    prepare = getattr(pipeline, "_prepare_generate_kwargs", None)
    return {"generation_config": pipeline.generation_config, **settings} if prepare is None else prepare(settings)
