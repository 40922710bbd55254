"""Every branch on a library version, each with the day it can go.

Place in the flow: below everything. A module that needs to know a version asks here, so that the list of shims is
this file.
"""

import functools
import inspect
from typing import Any

MIN_TRANSFORMERS = (5, 17)

#: Versions on which the tests were run: those of CI, which constraints.txt pins, and those of the run on an H100
#: (docs/how_to_gpu.md). Of Python the minor version counts. The floors are in pyproject.toml.
TESTED = {
    "CI": {"python": "3.11", "torch": "2.13.0", "transformers": "5.24.0", "triton": "3.7.1"},
    "H100": {"python": "3.12", "torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"},
}


def require_transformers() -> None:
    """Refuse an installed transformers older than 5.17, from where T5 runs on the attention interface.

    Goes when pip refuses such an environment by itself (it does, unless installed with ``--no-deps``).

    Raises:
        ImportError: it is; what to run is named.
    """
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < MIN_TRANSFORMERS:
        wanted = ".".join(map(str, MIN_TRANSFORMERS))
        raise ImportError(
            f"gisting needs transformers >= {wanted}, found {transformers.__version__}; run: pip install "
            f"'transformers>={wanted}'"
        )


def is_version_in(specifier: str, version: str) -> bool:
    """Whether a version is one that ``pip install`` would take for a specifier. Stays: it decides nothing by itself.

    Args:
        specifier: such as ``">=2.11"``; an empty one takes all.
        version: such as ``"2.13.0+cpu"``.
    """
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def untested(package: str, version: str) -> str | None:
    """Say how a version lies outside those on which the tests were run. Stays: it decides nothing by itself.

    Args:
        package: such as ``"torch"``, or ``"python"``.
        version: such as ``"2.14.1+cu130"``; what follows the plus is ignored.

    Returns:
        Such as ``"newer than 2.13.0, the newest that was tested"``; None for a version between the oldest and the
        newest in :data:`TESTED`, and for a package that is not in it.
    """
    from packaging.version import Version

    tested = sorted(Version(row[package]) for row in TESTED.values() if package in row)
    if not tested:
        return None
    oldest, newest = tested[0], tested[-1]
    # No further than the table goes: Python 3.12.3 is 3.12.
    release = Version(version).release[: len(newest.release)]
    if release > newest.release:
        return f"newer than {newest}, the newest that was tested"
    if release < oldest.release:
        return f"older than {oldest}, the oldest that was tested"
    return None


@functools.cache
def cache_argument() -> str:
    """The keyword by which models and ``generate`` take a transformers cache, and the field of their outputs.

    It is ``"cache"`` from transformers 5.24 and ``"past_key_values"`` before. Goes when the floor is 5.24.
    """
    from transformers import GenerationMixin

    generating: Any = GenerationMixin
    names = inspect.signature(generating.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


def num_constraint_numbers(num_beams: int, num_return_sequences: int) -> int:
    """How many row numbers stock ``generate`` has for one prompt when it asks a ``prefix_allowed_tokens_fn``.

    Beams share one. Several samples have one each before transformers 5.24, and share one from there. Goes when the
    floor is 5.24.

    Args:
        num_beams: of the call.
        num_return_sequences: of the call.
    """
    import transformers

    if is_version_in(">=5.24", transformers.__version__):
        return 1
    return max(num_beams, num_return_sequences) // num_beams


def activation_checkpointing(enabled: bool) -> dict[str, bool]:
    """The argument of ``TrainingArguments`` that trades time for memory, by the name that this transformers has for it.

    ``gradient_checkpointing`` is deprecated in favour of ``activation_checkpointing``. Goes when the floor knows the
    new name.

    Args:
        enabled: whether less memory is used, for more time.
    """
    from dataclasses import fields

    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": enabled}


def pipeline_settings(pipeline: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What a transformers pipeline would give ``generate`` for a call with these settings.

    Until 5.17 or so a pipeline kept one ``generation_config``; now it makes the settings of each call. Goes when the
    floor has the second.

    Args:
        pipeline: of transformers.
        settings: what the call says, beside the pipeline's own.
    """
    prepare = getattr(pipeline, "_prepare_generate_kwargs", None)
    return {"generation_config": pipeline.generation_config, **settings} if prepare is None else prepare(settings)
