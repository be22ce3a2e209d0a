"""From a tile kernel to the machine program of a chip, a pass a file.

partition -> hoist -> legalise (tile IR) -> lower (a tree of instructions) -> synchronise ->
allocate -> emit (machine IR).  ``pipeline`` runs them; ``search`` chooses tile sizes by asking the
simulator.  Nothing here knows a chip: all that differs is read from its machine file.
"""
