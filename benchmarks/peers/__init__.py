"""The engines that dure is compared with, each run as a subprocess in its own virtual environment."""
