"""dure (두레): one program, every NPU."""

__version__ = "0.1.0"
