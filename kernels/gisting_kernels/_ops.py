"""The namespace of the operators.

A build for the Kernel Hub replaces this file to use its own namespace, so that several versions can be loaded into one
process.

Place in the flow: below op.
"""

import torch

__all__ = ["add_op_namespace_prefix", "ops"]

ops = torch.ops.gisting


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the full name of the operator ``op_name``."""
    return f"gisting::{op_name}"
