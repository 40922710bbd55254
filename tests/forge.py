"""Take gist cache files apart and reassemble them with changes and a correct checksum, as a hostile writer could.

The checksum is computed here independently, from the bytes alone, so the format is pinned by something other than the
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
    """A file in three parts: the entries of its tensors, the manifest, and the bytes of the tensors."""

    entries: dict[str, Any]
    manifest: Any
    data: bytes

    @classmethod
    def apart(cls, whole: bytes) -> Forged:
        end = 8 + int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8:end])
        return cls(entries, json.loads(entries.pop("__metadata__")["gist"]), whole[end:])

    def together(self, *, signed: bool = True, indent: int | None = None) -> bytes:
        """Assemble the file. ``signed`` adds the checksum of its present contents, as far as it can be computed."""
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
                continue  # not a tensor: refused before the checksum is read
        return digest.hexdigest()

    def replace(self, name: str, kind: str, shape: list[int], data: bytes) -> None:
        """Replace a tensor, or append a new one. The offsets of the others move."""
        parts = {key: self.data[slice(*entry["data_offsets"])] for key, entry in self.entries.items()}
        parts[name] = data
        self.entries[name] = {"dtype": kind, "shape": shape}
        self._lay_out(parts)

    def remove(self, name: str) -> None:
        """Remove a tensor."""
        parts = {key: self.data[slice(*entry["data_offsets"])] for key, entry in self.entries.items() if key != name}
        del self.entries[name]
        self._lay_out(parts)

    def _lay_out(self, parts: dict[str, bytes]) -> None:
        # Large elements first, so that each is at a multiple of its size.
        order = sorted(parts, key=lambda key: (-SIZES.get(self.entries[key]["dtype"], 1), key))
        self.data = b""
        for key in order:
            first = len(self.data)
            self.data += parts[key]
            self.entries[key]["data_offsets"] = [first, len(self.data)]


def with_header(header: bytes, data: bytes) -> bytes:
    """Make a safetensors file with this header, padded with spaces to a multiple of 8."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data
