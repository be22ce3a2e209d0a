"""Kernels as files that later releases read: :mod:`~dure.library.artefact.container` is the file,
:mod:`~dure.library.artefact.kernels` what is in it of a kernel.

The file format and what is promised of it: docs/artefacts.md.
"""
