"""dure (두레): one program, every NPU.

``dure.kernel`` compiles tile kernels written in Python with the names of :mod:`dure.lang`;
``dure.tune`` measures tile sizes.  Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dure import lang as lang
    from dure.errors import DureError as DureError
    from dure.errors import KernelError as KernelError
    from dure.lang.kernel import Kernel as Kernel
    from dure.lang.kernel import kernel as kernel
    from dure.lang.tune import tune as tune
    from dure.models.artefact import load as load
    from dure.models.artefact import save as save

__version__ = "0.1.0"

#: Public names and the modules that hold them.
_LAZY = {
    "kernel": "dure.lang.kernel",
    "Kernel": "dure.lang.kernel",
    "tune": "dure.lang.tune",
    "save": "dure.models.artefact",
    "load": "dure.models.artefact",
    "DureError": "dure.errors",
    "KernelError": "dure.errors",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "lang":
        return import_module("dure.lang")
    raise AttributeError(f"module 'dure' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "lang"])
