"""Configurations that were measured by ``tune`` (triton_tune.py), kept on disk per GPU and triton version.

The file is only a hint: whatever stands in it, a configuration is used only if it is one of the candidates
that the rule of triton_config.py allows for that convolution and input.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsp_kernels.backends.triton_config import TritonConfig
from dsp_kernels.whole_file import write_text

__all__ = ["ConfigCache", "cache_file", "cache_folder"]

_VERSION = 1
_MOST_BYTES = 4 << 20
_MOST_ENTRIES = 8192


def cache_folder() -> Path:
    """$DSP_KERNELS_CACHE, or dsp-kernels in the user's cache folder."""
    named = os.environ.get("DSP_KERNELS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsp-kernels"


def cache_file(gpu: str, triton_version: str) -> Path:
    """One file per GPU name and triton version."""
    return cache_folder() / (re.sub(r"[^A-Za-z0-9.]+", "-", f"triton {triton_version} {gpu}") + ".json")


class ConfigCache:
    """signature -> configuration, in one file. A file that is missing, foreign or damaged counts as empty."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._configs: dict[str, TritonConfig] | None = None

    def get(self, signature: str) -> TritonConfig | None:
        """The configuration kept for a signature; None if there is none."""
        if self._configs is None:
            self._configs = _read(self.file)
        return self._configs.get(signature)

    def put(self, signature: str, config: TritonConfig) -> None:
        """Keep one beside what other processes wrote. A folder that cannot be written is no error."""
        configs = _read(self.file)
        configs.pop(signature, None)
        configs[signature] = config
        while len(configs) > _MOST_ENTRIES:
            configs.pop(next(iter(configs)))
        self._configs = configs
        plain = {"version": _VERSION, "configs": {key: kept.to_dict() for key, kept in configs.items()}}
        with suppress(OSError):
            write_text(self.file, json.dumps(plain, indent=1))


def _read(file: Path) -> dict[str, TritonConfig]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            return {}
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(plain, dict) or plain.get("version") != _VERSION:
        return {}
    configs = plain.get("configs")
    if not isinstance(configs, dict):
        return {}
    read = {key: _config(entry) for key, entry in list(configs.items())[:_MOST_ENTRIES]}
    return {key: config for key, config in read.items() if config is not None}


def _config(entry: Any) -> TritonConfig | None:
    """The configuration, if every field is there, of its type, and nothing else is."""
    kinds = {"bool": bool, "int": int, "str": str}
    expected: Mapping[str, type] = {field.name: kinds[str(field.type)] for field in fields(TritonConfig)}
    if not isinstance(entry, dict) or entry.keys() != expected.keys():
        return None
    if any(type(entry[name]) is not kind for name, kind in expected.items()):
        return None
    return TritonConfig(**entry)
