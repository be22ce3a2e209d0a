"""The commands; nothing but argument parsing and printing."""
