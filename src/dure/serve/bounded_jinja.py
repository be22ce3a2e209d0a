"""A Jinja environment for templates that nobody here has read.

Chat templates come inside model files.  Jinja's immutable sandbox keeps them from reaching Python;
this environment also bounds what they use.  A template has a budget of steps (loop iterations,
calls, filters, operators), of characters written, of the size of any value, and of time; what goes
over is :class:`TemplateLimitError`.  Operations that could grow a value at one stroke beyond its
bound (``*``, ``center``, ``replace``, format widths, ...) are checked before they run.

Not covered: comparing two separately built, deeply shared structures, and what an argument's own
methods do; callers pass plain data.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1 << 18
"""Characters in a template; the longest published ones have 40,000."""
MAX_STEPS = 500_000
MAX_CHARACTERS = 1 << 24
"""Characters in one value, with all that it holds."""
MAX_PARTS = 1 << 18
"""Items and members in one value, counted through its nesting."""
MAX_WRITTEN = 1 << 27
"""Characters that all output statements and loop bodies together may write."""
MAX_INTEGER = 100_000
"""The largest width, count or indent that may be passed to a method or a filter."""
MAX_INTEGER_BITS = 4096
MAX_SECONDS = 10.0

_WIDTH = re.compile(r"\d{5,}")


class TemplateLimitError(Exception):
    """The template used more than its budget; the message says of what."""


class Budget:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self.steps = 0
        self.written = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, written: int = 0) -> None:
        """Count one step, and the characters that it writes."""
        self.steps += 1
        self.written += written
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"more than {MAX_STEPS} steps")
        if self.written > MAX_WRITTEN:
            raise TemplateLimitError(f"more than {MAX_WRITTEN} characters written")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise TemplateLimitError(f"more than {MAX_SECONDS:.0f} seconds")


_budget: ContextVar[Budget] = ContextVar("budget")


def with_budget(action: Callable[[], str]) -> str:
    """Run ``action``, which compiles or renders, under a fresh budget."""
    token = _budget.set(Budget())
    try:
        return action()
    finally:
        _budget.reset(token)


def weigh(value: object) -> int:
    """Characters, items and members of a value; TemplateLimitError when they are too many."""
    if isinstance(value, str | bytes):
        _allow(len(value))
        return len(value)
    characters = parts = 0
    waiting: list[object] = [value]
    while waiting:
        item = waiting.pop()
        parts += 1
        if isinstance(item, str | bytes):
            characters += len(item)
        elif isinstance(item, Mapping):
            members = cast(Mapping[object, object], item)
            waiting += members.keys()
            waiting += members.values()
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += cast(Iterable[object], item)
        _allow(characters)
        if parts + len(waiting) > MAX_PARTS:
            raise TemplateLimitError(f"a value of more than {MAX_PARTS} parts")
    return characters + parts


def _weighed(value: Any) -> Any:
    """The value itself, weighed if it is plain data."""
    weigh(value)
    return value


def _allow(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"a value of about {characters:.2g} characters")


def _check_integers(arguments: Iterable[object]) -> None:
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_INTEGER:
            raise TemplateLimitError(f"the number {argument:.0e} as a width or a count")


def _check_percent(pattern: str, values: object) -> None:
    if _WIDTH.search(pattern) or "*" in pattern:
        raise TemplateLimitError("a format with a large or computed width")
    _allow(len(pattern) + pattern.count("%") * weigh(values))


def _check_format(pattern: str, values: object) -> None:
    if _WIDTH.search(pattern) or re.search(r"\{[^{}]*\{", pattern.replace("{{", "")):
        raise TemplateLimitError("a format with a large or computed width")
    _allow(len(pattern) + pattern.count("{") * weigh(values))


def _check_growth(text: str, name: str, arguments: Sequence[object]) -> None:
    """Refuse a string method (or the filter of that name) whose result would be too large."""
    if name == "join" and arguments:
        if isinstance(arguments[0], Sequence):
            items = cast(Sequence[object], arguments[0])
            _allow(len(text) * len(items) + weigh(items))
    elif name == "replace" and len(arguments) >= 2:
        _allow((len(text) + 1) * (weigh(arguments[1]) + 1))
    elif name in ("format", "format_map"):
        _check_format(text, list(arguments))
    elif name == "expandtabs":
        _allow(len(text) * 8 if not arguments else len(text) * _integer(arguments[0]))
    elif name == "translate":
        raise TemplateLimitError("the method translate")


def _integer(value: object) -> int:
    return abs(value) if isinstance(value, int) else 0


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with a step counted, its arguments checked before and its result after."""
    # Filters may want the context or the environment as an extra first argument.
    skip = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        _budget.get().step()
        value, options = arguments[skip], [*arguments[skip + 1 :], *named.values()]
        if name not in _NUMBER_FILTERS:
            _check_integers(options)
        if name == "replace":
            _check_growth(str(value), name, options)
        elif name == "join" and options:
            _check_growth(str(options[0]), name, [value])
        elif name == "format":
            _check_percent(str(value), options)
        elif name in ("indent", "wordwrap", "tojson"):
            longest = max([1, *(_integer(o) for o in options), *map(len, _strings(options))])
            _allow((str(value).count("\n") + 1 if name == "indent" else weigh(value)) * longest)
        elif name in ("string", "pprint", "e", "escape", "urlencode", "xmlattr", "list"):
            weigh(value)
        return _weighed(function(*arguments, **named))

    return guarded


_NUMBER_FILTERS = frozenset({"default", "d", "round", "int", "float", "sum"})


def _strings(values: Iterable[object]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


class _CountedLoop:
    """What a ``for`` goes over, with a step for each round; has a length if the original has."""

    def __init__(self, items: Iterable[Any], written: int) -> None:
        self._items = items
        self._written = written

    def __iter__(self) -> Iterator[Any]:
        budget, written = _budget.get(), self._written
        for item in self._items:
            budget.step(written)
            yield item


class _CountedSequence(_CountedLoop):
    def __len__(self) -> int:
        return len(cast(Sequence[Any], self._items))


def _count_loop(items: Iterable[Any], written: int) -> _CountedLoop:
    return (_CountedSequence if hasattr(items, "__len__") else _CountedLoop)(items, written)


def _concatenate(parts: Sequence[Any]) -> str:
    _budget.get().step()
    weigh(parts)
    return "".join(map(str, parts))


def _checked(value: Any) -> Any:
    _budget.get().step()
    return _weighed(value)


class _GenerationBlock(Extension):
    """``{% generation %}``: marks the assistant's words for training; rendering passes it
    through."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Hugging Face's chat template environment, with bounds; see the module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(
        self, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]]
    ) -> None:
        """``filters`` replace or join Jinja's own; ``functions`` are global names."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
            finalize=self._write,
            cache_size=0,
        )
        names = cast(dict[str, Any], self.globals)
        names.pop("lipsum", None)
        names.update(functions)
        table = cast(dict[str, Any], self.filters)
        table.update(filters)
        for name, function in list(table.items()):
            table[name] = _guard_filter(name, function)
        table.update({_COUNT: _count_loop, _CONCATENATE: _concatenate, _CHECK: _checked})
        self._source_length = 0

    def _write(self, value: Any) -> Any:
        _budget.get().step(weigh(value))
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"a source of {len(source)} characters")
        self._source_length = max(self._source_length, len(source))
        return cast(nodes.Template, _bound(super()._parse(source, name, filename)))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        # A macro's static text is not written by output statements: charge for all it may hold.
        budget.step(__self._source_length if isinstance(__obj, Macro) else 0)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            arguments = [*args, *kwargs.values()]
            _check_integers(arguments)
            if isinstance(owner, str):
                _check_growth(owner, getattr(__obj, "__name__", ""), arguments)
        return _weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget.get().step()
        if isinstance(left, int) and isinstance(right, int):
            if operator == "**" and left.bit_length() * abs(right) > MAX_INTEGER_BITS:
                raise TemplateLimitError("a power with too many digits")
            if operator == "*" and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
                raise TemplateLimitError("a product with too many digits")
        elif operator == "%" and isinstance(left, str):
            _check_percent(left, right)
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(value, str | list | tuple):
                    _allow(weigh(cast(object, value)) * max(count, 0))
        return _weighed(super().call_binop(context, operator, left, right))


# Names that no template can write, for the filters that the rewriting below puts in.
_COUNT, _CONCATENATE, _CHECK = "loop rounds", "concatenate", "check size"


def _bound(tree: nodes.Node) -> nodes.Node:
    """The template's tree with loops counted, and ``~`` and literal containers checked."""
    for child in list(tree.iter_child_nodes()):
        _bound(child)
    for field, value in list(tree.iter_fields()):
        if isinstance(value, list):
            items = cast(list[Any], value)
            items[:] = [_replacement(item) for item in items]
        else:
            setattr(tree, field, _replacement(value))
    if isinstance(tree, nodes.For):
        written = sum(len(data.data) for data in tree.find_all(nodes.TemplateData))
        tree.iter = _filter(cast(nodes.Expr, tree.iter), _COUNT, nodes.Const(written))
    return tree


def _replacement(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes), _CONCATENATE)
    if isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    ):
        return _filter(node, _CHECK)
    return node


def _filter(node: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)
