"""--format: the part of Go's templates that scripts written for Docker use.

    {{.Name}}  {{.State.Status}}  {{json .Mounts}}  {{index .Config.Labels "a"}}  {{len .Mounts}}  {{join .Args " "}}
    {{range .Mounts}}{{.Source}} {{end}}    {{range $name, $value := .Config.Labels}}{{$name}}{{else}}none{{end}}
    {{if eq .State.Status "created"}}new{{else if .Name}}named{{end}}    {{with .Config.Healthcheck}}{{.}}{{end}}
    {{.Name | upper | printf "%q"}}    {{- .Name -}}    {{/* a comment */}}

What there is beyond that is refused by name. Values are those of JSON; a field that is not there is an error, as with
Docker. Follows Go's text/template, and docker/cli templates/templates.go for the functions.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from overlaykit.errors import OverlaykitError

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
TOKEN = re.compile(
    r"""\s*( "(?:[^"\\]|\\.)*" | `[^`]*` | -?\d+ | \$\w*(?:\.\w+)* | \)(?:\.\w+)* | (?:\.\w+)+ | \. | := | \w+ | [|(,] )""",
    re.DOTALL | re.VERBOSE,
)
LITERALS: dict[str, Any] = {"true": True, "false": False, "nil": None}
BLOCKS = ("if", "range", "with")
REFUSED = ("define", "template", "block", "break", "continue")

Names = Mapping[str, Any]  # variables by "$name", functions by their names
Term = Callable[[Any, Names], Any]  # what a piece of a pipeline is, given the dot
Node = Callable[[Any, dict[str, Any]], str]  # what a piece of a template prints


class InvalidTemplate(OverlaykitError, ValueError):
    """A --format that cannot be read. Docker's exit code for one is 64 too."""

    exit_code = 64


class Template:
    """A parsed template; `render(value)` is its text. InvalidTemplate for what is none, or is not supported."""

    def __init__(self, source: str) -> None:
        self._pieces = _pieces(source)
        try:
            self._nodes, _ = self._body("")
        except RecursionError:
            raise InvalidTemplate("template: nested too deep") from None

    def render(self, value: Any) -> str:
        """The text for `value`. OverlaykitError for a field that is not there, or a value that does not fit."""
        return _printed(self._nodes, value, {**FUNCTIONS, "$": value})

    def header(self, titles: Mapping[str, str]) -> str:
        """The text with the title of each field in its place, whatever is done with the field."""
        functions = dict.fromkeys(FUNCTIONS, lambda *args: args[-1] if args else "")
        return _printed(self._nodes, titles, {**functions, "$": titles})

    def _body(self, block: str) -> tuple[list[Node], str]:
        """The nodes up to the {{else}} or {{end}} of `block`, and that action; "" is the whole template."""
        nodes: list[Node] = []
        while self._pieces:
            text, is_action = self._pieces.pop(0)
            word, _, rest = text.partition(" ")
            if not is_action:
                if text:
                    nodes.append(lambda dot, names, text=text: text)  # type: ignore[misc]
            elif word in ("else", "end"):
                if not block:
                    raise InvalidTemplate(f"template: unexpected {{{{{text}}}}}")
                return nodes, text
            elif word in BLOCKS:
                nodes.append(self._block(word, rest))
            elif word in REFUSED:
                raise InvalidTemplate(f"template: {word} is not supported", hint=f"there are {', '.join(BLOCKS)}")
            else:
                nodes.append(_print(*_pipeline(text)))
        if block:
            raise InvalidTemplate(f"template: {{{{{block}}}}} without {{{{end}}}}")
        return nodes, ""

    def _block(self, word: str, rest: str) -> Node:
        variables, pipe = _pipeline(rest)
        body, closing = self._body(word)
        other: list[Node] = []
        if closing != "end":
            again, _, condition = closing.removeprefix("else").strip().partition(" ")
            if again in BLOCKS:  # it shares our {{end}}
                other = [self._block(again, condition)]
            else:
                other, closing = self._body(word)
            if again not in ("", *BLOCKS) or (not again and closing != "end"):
                raise InvalidTemplate(f"template: unexpected {{{{{closing}}}}}")
        return {"if": _if, "with": _with, "range": _range}[word](variables, pipe, body, other)


def _pieces(source: str) -> list[tuple[str, bool]]:
    """(text, whether it is an action) piece by piece; blanks that a dash takes away are gone, and comments."""
    pieces: list[tuple[str, bool]] = []
    at, trimmed = 0, False
    for action in ACTION.finditer(source):
        text = source[at : action.start()]
        text = text.lstrip() if trimmed else text
        pieces.append((text.rstrip() if action[1] else text, False))
        content = action[2].strip()
        if not content.startswith("/*"):
            pieces.append((content, True))
        at, trimmed = action.end(), bool(action[3])
    rest = source[at:].lstrip() if trimmed else source[at:]
    if "{{" in rest:
        raise InvalidTemplate("template: unclosed action")
    return [*pieces, (rest, False)]


# --- blocks -----------------------------------------------------------------------------------------------------------


def _printed(nodes: list[Node], dot: Any, names: dict[str, Any]) -> str:
    return "".join([node(dot, names) for node in nodes])


def _print(variables: list[str], pipe: Term) -> Node:
    if not variables:
        return lambda dot, names: shown(pipe(dot, names))

    def node(dot: Any, names: dict[str, Any]) -> str:
        names[variables[0]] = pipe(dot, names)
        return ""

    return node


def _if(variables: list[str], pipe: Term, body: list[Node], other: list[Node]) -> Node:
    def node(dot: Any, names: dict[str, Any]) -> str:
        value = pipe(dot, names)
        return _printed(body if value else other, dot, names | dict.fromkeys(variables, value))

    return node


def _with(variables: list[str], pipe: Term, body: list[Node], other: list[Node]) -> Node:
    def node(dot: Any, names: dict[str, Any]) -> str:
        value = pipe(dot, names)
        return _printed(body, value, names | dict.fromkeys(variables, value)) if value else _printed(other, dot, names)

    return node


def _range(variables: list[str], pipe: Term, body: list[Node], other: list[Node]) -> Node:
    def node(dot: Any, names: dict[str, Any]) -> str:
        value = pipe(dot, names)
        if value is not None and not isinstance(value, dict | list | tuple):
            raise OverlaykitError(f"template: range can't iterate over {shown(value)}")
        pairs = sorted(value.items()) if isinstance(value, dict) else list(enumerate(value or ()))
        text = ""
        for key, each in pairs:
            given = (key, each) if len(variables) > 1 else (each,)
            text += _printed(body, each, names | dict(zip(variables, given, strict=False)))
        return text if pairs else _printed(other, dot, names)

    return node


# --- pipelines --------------------------------------------------------------------------------------------------------


def _pipeline(source: str) -> tuple[list[str], Term]:
    """The variables that a pipeline sets, and the pipeline."""
    tokens, at = [], 0
    while source[at:].strip():
        found = TOKEN.match(source, at)
        if found is None:
            raise InvalidTemplate(f"template: unexpected {source[at:].strip()[:20]!r} in {{{{{source}}}}}")
        tokens.append(found[1])
        at = found.end()
    variables: list[str] = []
    if ":=" in tokens:
        cut = tokens.index(":=")
        variables, tokens = [token for token in tokens[:cut] if token != ","], tokens[cut + 1 :]
        if not variables or not all(name.startswith("$") for name in variables) or len(variables) > 2:
            raise InvalidTemplate(f"template: a declaration that is none: {{{{{source}}}}}")
    pipe = _commands(tokens)
    if tokens:
        raise InvalidTemplate(f"template: unexpected {tokens[0]!r} in {{{{{source}}}}}")
    return variables, pipe


def _commands(tokens: list[str]) -> Term:
    """`command | command`, up to the end or to a closing parenthesis, which is left; each gets the last one's value."""
    commands: list[list[Term]] = [[]]
    while tokens and not tokens[0].startswith(")"):
        token = tokens.pop(0)
        if token == "|":
            commands.append([])
        else:
            commands[-1].append(_group(tokens) if token == "(" else _term(token))
    if not all(commands):
        raise InvalidTemplate("template: missing value for command")

    if len(commands) == 1 and len(commands[0]) == 1:  # a field, and nothing to do with it: so most are
        (term,) = commands[0]

        def plain(dot: Any, names: Names) -> Any:
            value = term(dot, names)
            return _called(value, ()) if callable(value) else value

        return plain

    def run(dot: Any, names: Names) -> Any:
        last: tuple[Any, ...] = ()
        for head, *rest in commands:
            value = head(dot, names)
            args = (*(term(dot, names) for term in rest), *last)
            if callable(value):
                value = _called(value, args)
            elif args:
                raise OverlaykitError(f"template: can't give argument to non-function {shown(value)}")
            last = (value,)
        return last[0]

    return run


def _called(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except (TypeError, ValueError, IndexError, AttributeError) as e:
        raise OverlaykitError(f"template: {getattr(function, '__name__', 'function').strip('_')}: {e}") from None


def _group(tokens: list[str]) -> Term:
    pipe = _commands(tokens)
    if not tokens:
        raise InvalidTemplate("template: unclosed left paren")
    return _with_fields(pipe, tokens.pop(0)[1:])


def _term(token: str) -> Term:
    if token[0] in '"`':
        text = token[1:-1] if token[0] == "`" else _unquoted(token)
        return lambda dot, names: text
    if token.lstrip("-").isdecimal():
        return lambda dot, names: int(token)
    if token[0] == ".":
        return _with_fields(lambda dot, names: dot, token.rstrip(".") or "")
    if token[0] == "$":
        name, dot_sign, rest = token.partition(".")
        return _with_fields(lambda dot, names: _variable(names, name), dot_sign + rest)
    if token in LITERALS:
        return lambda dot, names: LITERALS[token]
    if token in FUNCTIONS:
        return lambda dot, names: names[token]
    raise InvalidTemplate(f"template: function {token!r} is not there", hint=f"there are {', '.join(FUNCTIONS)}")


def _unquoted(token: str) -> Any:
    import json

    try:
        return json.loads(token, strict=False)
    except ValueError:
        raise InvalidTemplate(f"template: {token} is no string") from None


def _variable(names: Names, name: str) -> Any:
    if name not in names:
        raise InvalidTemplate(f"template: undefined variable {name}")
    return names[name]


def _with_fields(term: Term, fields: str) -> Term:
    """`term` and then the fields of ".A.B" of it."""

    steps = fields.split(".")[1:]

    def value(dot: Any, names: Names) -> Any:
        found = term(dot, names)
        for name in steps:
            try:
                found = found[name]
            except (KeyError, TypeError):
                if isinstance(found, Mapping) and name in found:  # it is there, and could not be worked out
                    raise
                raise OverlaykitError(f"template: there is no .{name} in <{fields}>") from None
        return found

    return value


# --- functions --------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """JSON in one line, as Docker writes it."""
    import json

    return json.dumps(_in_order(value), separators=(",", ":"), ensure_ascii=False, default=str)


def _in_order(value: Any) -> Any:
    """`value` with the keys of maps sorted; a struct's, which are Names, stay in the order of its fields."""
    if isinstance(value, Mapping):
        is_struct = all(isinstance(key, str) and key[:1].isupper() for key in value)
        pairs = value.items() if is_struct else sorted(value.items())
        return {key: _in_order(each) for key, each in pairs if not callable(each)}
    return [_in_order(each) for each in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """`value` as Go prints it: true, [a b], map[key:value]; <no value> for none."""
    if isinstance(value, str):
        return value
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{key}:{shown(each)}' for key, each in sorted(value.items()))}]"
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(shown, value))}]"
    return str(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if value is None or isinstance(value, Mapping):  # a map that is not set is an empty one
            value = (value or {}).get(key, "")
        else:
            if isinstance(key, int) and key < 0:
                raise ValueError(f"index out of range: {key}")
            value = value[key]
    return value


def _printf(form: str, *args: Any) -> str:
    import json

    given = iter(args)

    def one(found: re.Match[str]) -> str:
        if found[2] == "%":
            return "%"
        value = next(given, "%!(MISSING)")
        text = json.dumps(str(value), ensure_ascii=False) if found[2] == "q" else shown(value)
        width = found[1].lstrip("-")
        return text.ljust(int(width or 0)) if found[1].startswith("-") else text.rjust(int(width or 0))

    return re.sub(r"%(-?\d{0,3})([svdq%])", one, form)


def _print_values(*values: Any) -> str:
    """Values one after another, a blank between two of which neither is text."""
    text = ""
    for before, value in zip((None, *values), values, strict=False):
        blank = before is not None and not isinstance(before, str) and not isinstance(value, str)
        text += f" {shown(value)}" if blank else shown(value)
    return text


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": to_json,
    "len": lambda value: len(value or ()),
    "index": _index,
    "join": lambda values, sign: sign.join(map(str, values or ())),
    "split": lambda text, sign: text.split(sign),
    "upper": lambda text: text.upper(),
    "lower": lambda text: text.lower(),
    "title": lambda text: text.title(),
    "truncate": lambda text, length: text[:length],
    "pad": lambda text, before, after: " " * before + text + " " * after,
    "print": _print_values,
    "println": lambda *values: " ".join(map(shown, values)) + "\n",
    "printf": _printf,
    "eq": lambda first, *others: first in others,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": _and,
    "or": _or,
    "not": operator.not_,
}
