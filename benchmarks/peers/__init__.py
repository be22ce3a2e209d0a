"""The engines that dure is compared with, each in a process and virtual environment of its own."""
