"""Machines as data: the schema and the loader of ``machine.toml``."""

from __future__ import annotations

from dure.machine.loader import load_machine, parse_machine
from dure.machine.quantity import Quantity
from dure.machine.schema import Engine, Machine, Memory

__all__ = ["Engine", "Machine", "Memory", "Quantity", "load_machine", "parse_machine"]
