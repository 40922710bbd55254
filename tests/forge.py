"""Gist cache files taken apart and put together again, changed, with a right checksum: what a hostile writer can do.

The checksum is computed here once more, from the bytes alone, so that the format is pinned by something that is not the
code under test.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

SIZES = {"F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1}
TORCH_NAMES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "BF16": "torch.bfloat16",
    "F16": "torch.float16",
    "F8_E4M3": "torch.float8_e4m3fn",
    "I8": "torch.int8",
    "I32": "torch.int32",
}


@dataclass
class Forged:
    """A file in parts: the entries of its tensors, the manifest, the bytes of the tensors."""

    entries: dict[str, Any]
    manifest: Any
    data: bytes

    @classmethod
    def apart(cls, whole: bytes) -> Forged:
        end = 8 + int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8:end])
        return cls(entries, json.loads(entries.pop("__metadata__")["gist"]), whole[end:])

    def together(self, *, signed: bool = True, indent: int | None = None) -> bytes:
        """The file; ``signed`` with the checksum of what it holds now, as far as that can be told."""
        if signed:
            self.manifest["sha256"] = self.checksum()
        text = json.dumps(self.manifest, sort_keys=True)
        header = json.dumps({"__metadata__": {"gist": text}, **self.entries}, indent=indent)
        return with_header(header.encode(), self.data)

    def checksum(self) -> str:
        rest = {key: value for key, value in self.manifest.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
        for name in sorted(self.entries):
            entry = self.entries[name]
            try:
                first, end = entry["data_offsets"]
                digest.update(f"{name} {TORCH_NAMES[entry['dtype']]} {tuple(entry['shape'])}\n".encode())
                digest.update(self.data[first:end])
            except (KeyError, TypeError, ValueError):
                continue  # no tensor: refused before anyone asks for a checksum
        return digest.hexdigest()

    def replace(self, name: str, kind: str, shape: list[int], data: bytes) -> None:
        """A tensor in place of one, or a new one at the end; the offsets of the others move."""
        parts = {key: self.data[slice(*entry["data_offsets"])] for key, entry in self.entries.items()}
        parts[name] = data
        self.entries[name] = {"dtype": kind, "shape": shape}
        self._lay_out(parts)

    def remove(self, name: str) -> None:
        """Without a tensor."""
        parts = {key: self.data[slice(*entry["data_offsets"])] for key, entry in self.entries.items() if key != name}
        del self.entries[name]
        self._lay_out(parts)

    def _lay_out(self, parts: dict[str, bytes]) -> None:
        # Large numbers first, so that each lies on a multiple of its size.
        order = sorted(parts, key=lambda key: (-SIZES.get(self.entries[key]["dtype"], 1), key))
        self.data = b""
        for key in order:
            first = len(self.data)
            self.data += parts[key]
            self.entries[key]["data_offsets"] = [first, len(self.data)]


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header as it is, filled up with spaces to a multiple of 8."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data
