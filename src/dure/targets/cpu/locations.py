"""Where each instruction comes from, as LLVM's metadata: lines of the author's files."""

from __future__ import annotations

from dure.ir.core import Span

#: The numbers of the function and of the first location; those before are what every module has.
_FUNCTION, _FIRST = 3, 6


class Locations:
    """The locations of one function's instructions."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._scopes: dict[str, int] = {}
        self._lines: list[str] = []

    def of(self, span: Span | None) -> str:
        """What an instruction is followed by."""
        line = 0 if span is None else span.line
        file = "dure" if span is None else span.file
        number = self._numbers.get((file, line))
        if number is None:
            scope = self._scope(file)
            number = self._add(f"!DILocation(line: {line}, column: 0, scope: !{scope})")
            self._numbers[file, line] = number
            if span is not None:
                self.spans.append(span)
        return f", !dbg !{number}"

    def _scope(self, file: str) -> int:
        if file not in self._scopes:
            here = self._add(f'!DIFile(filename: "{_escaped(file)}", directory: "")')
            scope = f"scope: !{_FUNCTION}, file: !{here}, discriminator: 0"
            self._scopes[file] = self._add(f"!DILexicalBlockFile({scope})")
        return self._scopes[file]

    def _add(self, text: str) -> int:
        self._lines.append(text)
        return _FIRST + len(self._lines) - 1

    @property
    def attribute(self) -> str:
        """What the function's definition says before its body."""
        return f" !dbg !{_FUNCTION}"

    def metadata(self, name: str) -> str:
        """The module's metadata for a function of this name."""
        fixed = [
            "distinct !DICompileUnit(language: DW_LANG_Python, file: !2, isOptimized: true, "
            "runtimeVersion: 0, emissionKind: LineTablesOnly)",
            '!{i32 2, !"Debug Info Version", i32 3}',
            '!DIFile(filename: "dure", directory: "")',
            f'distinct !DISubprogram(name: "{name}", scope: !2, file: !2, line: 0, type: !4, '
            "unit: !0, spFlags: DISPFlagDefinition)",
            "!DISubroutineType(types: !5)",
            "!{}",
        ]
        lines = [f"!{number} = {text}" for number, text in enumerate([*fixed, *self._lines])]
        return "\n".join(["!llvm.dbg.cu = !{!0}", "!llvm.module.flags = !{!1}", *lines, ""])


def _escaped(text: str) -> str:
    """A string as LLVM's assembly writes it."""
    plain = (c if 32 <= c < 127 and c not in (34, 92) else None for c in text.encode())
    return "".join(
        f"\\{byte:02X}" if c is None else chr(c)
        for c, byte in zip(plain, text.encode(), strict=True)
    )
