"""The one shape of every error that dure raises on purpose.

An error says what is wrong, where, which rule was broken, and a change that would work.  The
command line prints it as it is and exits with code 2; a library user catches :class:`DureError` or
a subclass.
"""

from __future__ import annotations


class DureError(Exception):
    """What is wrong, and how to mend it.

    ``what`` is one readable sentence.  ``where`` names the place (a file, a source span
    already rendered with its caret, a tensor's name), ``rule`` the rule that was broken, ``fix`` a
    change that would work.
    """

    def __init__(self, what: str, *, where: str = "", rule: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.rule = rule
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(self.where if "\n" in self.where else f"  where: {self.where}")
        if self.rule:
            lines.append(f"  rule: {self.rule}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class KernelError(DureError):
    """A kernel that cannot be compiled, or a launch whose arguments break the kernel's contract."""


class UnprovedError(KernelError):
    """A compiled program of which the sanitizer doesn't say that it is right: dure's own defect, or
    a proof that would take too long.
    """


class IRError(DureError):
    """A program that breaks a rule of the IR: typing, verification, parsing, a pass that errs."""


class ModelFileError(DureError):
    """A model file (GGUF, config.json, tokenizer) that is damaged, unknown or inconsistent."""


class ArtefactError(DureError):
    """A file of :func:`dure.save` that is damaged, not one, or of a newer release."""


class UsageError(DureError):
    """What the user of a command or an API asked for cannot be done as asked."""


class TargetError(DureError):
    """A host or a chip that lacks what a program needs."""
