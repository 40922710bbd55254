"""Every branch on a library version, each with the day it can go.

Place in the flow: below everything. A module that needs to know a version asks here, so that the list of shims is
this file.
"""

MIN_TRANSFORMERS = (5, 17)


def require_transformers() -> None:
    """Raise ImportError if the installed transformers is older than 5.17, from where T5 runs on the attention
    interface.

    Goes when pip refuses such an environment by itself (it does, unless installed with ``--no-deps``).
    """
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < MIN_TRANSFORMERS:
        wanted = ".".join(map(str, MIN_TRANSFORMERS))
        raise ImportError(
            f"gisting needs transformers >= {wanted}, found {transformers.__version__}; "
            f"run: pip install 'transformers>={wanted}'"
        )
