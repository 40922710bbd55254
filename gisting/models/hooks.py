"""Remove hooks from a model.

Place in the flow: below ``patch``, ``relative_bias`` and ``gist_lora``, which hook modules; independent of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

__all__ = ["remove_hooks"]


def remove_hooks(module: nn.Module, functions: Collection[Callable[..., Any]]) -> None:
    """Remove the forward hooks of ``module`` that are partials of ``functions``.

    Hooks are found by function and not by handle, because a copy of a model has hooks but no handles to them.

    Args:
        module: any module.
        functions: the functions whose partials are removed.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, functools.partial) and hook.func in functions:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
