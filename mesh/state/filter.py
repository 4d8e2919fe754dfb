"""The filter expressions of the HTTP API (`?filter=`): the grammar of go-bexpr 0.1.2, over JSON-shaped values.

    or-expression   := and-expression ( "or" and-expression )*
    and-expression  := not-expression ( "and" not-expression )*
    not-expression  := "not" not-expression | "(" or-expression ")" | match
    match           := selector ( "==" | "!=" | ["not"] "contains" | ["not"] "matches" ) value
                     | selector "is" ["not"] "empty"
                     | value ["not"] "in" selector
    selector        := identifier ( "." identifier | "[" string "]" )*
    value           := selector-like text | number | "quoted" | `raw`

Selectors name fields as the API's JSON does. Values are compared as the field's type: a number that the text is not,
or an operator that the type does not have, is an error. A selector that passes through a list is true when it is for
any element. Parsing is linear in the expression; matching is linear in the value, regular expressions included.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mesh.errors import InvalidRequest
from mesh.model.pattern import Pattern

EXPRESSION_CHARS_MAX = 8192  # a URL's worth
DEPTH_MAX = 64  # of parentheses and nots
SUBJECT_CHARS_MAX = 65_536  # of a string that a regular expression is matched against

Operator = Literal["==", "in", "matches", "empty"]

_TOKEN = re.compile(
    r"""[ \t\r\n]*(?:
      (?P<symbol>\(|\)|==|!=)
    | (?P<selector>[A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z][A-Za-z0-9_]*|\[[ \t\r\n]*(?:"[^"]*"|`[^`]*`)[ \t\r\n]*\])*)
    | (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?)(?=[ \t\r\n)]|\Z)
    | (?P<string>"[^"]*"|`[^`]*`)
    )""",
    re.VERBOSE,
)
_PART = re.compile(r"""\.?([A-Za-z][A-Za-z0-9_]*)|\[[ \t\r\n]*("[^"]*"|`[^`]*`)[ \t\r\n]*\]""")
_ESCAPE = re.compile(r"""\\(?:([abfnrtv\\'])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([0-7]{3})|(.?))""", re.DOTALL)
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


@dataclass(frozen=True)
class _Token:
    kind: str  # symbol, selector, number, string or end
    text: str
    at: int


# The fields of an object by name, each with the fields inside of it, or None where it has none or may have any.
FieldTree: TypeAlias = Mapping[str, "FieldTree | None"]


class Filter:
    """A parsed expression."""

    def __init__(self, expression: str, *, fields: FieldTree | None = None) -> None:
        """`fields` are all the fields that the values can have; a selector of any other is then an error.

        Raises InvalidRequest, with the text the API answers, when the expression is not valid.
        """
        if len(expression) > EXPRESSION_CHARS_MAX:
            raise _invalid(f"the expression is longer than {EXPRESSION_CHARS_MAX} characters")
        self._matches = _Parser(_tokens(expression), fields).parse()

    def matches(self, value: object) -> bool:
        """Whether the value is selected. A field that it lacks is empty.

        Raises InvalidRequest when a field has not the type that the expression needs.
        """
        return self._matches(value)


Predicate = Callable[[object], bool]


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(f"Failed to create boolean expression evaluator: {why}")


def _tokens(expression: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    end = len(expression.rstrip(" \t\r\n"))
    while at < end:
        match = _TOKEN.match(expression, at)
        if match is None:
            raise _invalid(f"{_place(expression, at)}: no match found")
        kind = match.lastgroup
        assert kind is not None
        tokens.append(_Token(kind, match[kind], match.start(kind)))
        at = match.end()
    tokens.append(_Token("end", "", end))
    return tokens


def _place(expression: str, at: int) -> str:
    line = expression.count("\n", 0, at) + 1
    return f"{line}:{at - expression.rfind(chr(10), 0, at)} ({at})"


def _unquote(text: str) -> str:
    """A string token's value: raw between backquotes, with Go's escapes between double quotes."""
    inner = text[1:-1]
    if text[0] == "`":
        return inner.replace("\r", "")

    def replacement(match: re.Match[str]) -> str:
        letter, hexadecimal, unicode, octal, _ = match.groups()
        if letter is not None and letter in _ESCAPES:
            return _ESCAPES[letter]
        if hexadecimal or unicode:
            return chr(int(hexadecimal or unicode, 16))
        if octal and int(octal, 8) < 256:
            return chr(int(octal, 8))
        raise _invalid(f"invalid escape {match[0]} in {text}")

    return _ESCAPE.sub(replacement, inner)


def _path(text: str) -> tuple[str, ...]:
    return tuple(match[1] if match[1] is not None else _unquote(match[2]) for match in _PART.finditer(text))


class _Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, tokens: list[_Token], fields: FieldTree | None) -> None:
        self._tokens = tokens
        self._fields = fields
        self._position = 0
        self._depth = 0

    def parse(self) -> Predicate:
        predicate = self._or()
        if self._next.kind != "end":
            raise self._unexpected()
        return predicate

    @property
    def _next(self) -> _Token:
        return self._tokens[self._position]

    def _unexpected(self) -> InvalidRequest:
        token = self._next
        found = token.text or "the end"
        return _invalid(f"1:{token.at + 1} ({token.at}): no match found, unexpected {found}")

    def _take(self, *texts: str) -> bool:
        """Takes these words or symbols if they come next."""
        following = self._tokens[self._position : self._position + len(texts)]
        if any(token.kind not in ("symbol", "selector") for token in following):
            return False
        if tuple(token.text for token in following) != texts:
            return False
        self._position += len(texts)
        return True

    def _or(self) -> Predicate:
        branches = [self._and()]
        while self._take("or"):
            branches.append(self._and())
        return branches[0] if len(branches) == 1 else lambda value: any(branch(value) for branch in branches)

    def _and(self) -> Predicate:
        branches = [self._not()]
        while self._take("and"):
            branches.append(self._not())
        return branches[0] if len(branches) == 1 else lambda value: all(branch(value) for branch in branches)

    def _not(self) -> Predicate:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise _invalid(f"the expression nests deeper than {DEPTH_MAX} levels")
        if self._take("not"):
            inner = self._not()
            predicate: Predicate = lambda value: not inner(value)  # noqa: E731 - the branches build one variable
        elif self._take("("):
            predicate = self._or()
            if not self._take(")"):
                raise self._unexpected()
        else:
            predicate = self._match()
        self._depth -= 1
        return predicate

    def _match(self) -> Predicate:
        token = self._next
        if token.kind not in ("selector", "number", "string"):
            raise self._unexpected()
        self._position += 1
        if self._take("in"):
            return _predicate(self._selector(), "in", self._value_of(token), negated=False)
        if self._take("not", "in"):
            return _predicate(self._selector(), "in", self._value_of(token), negated=True)
        if token.kind != "selector":
            raise self._unexpected()
        path = self._field_path(token)
        if self._take("is", "not", "empty"):
            return _predicate(path, "empty", "", negated=True)
        if self._take("is", "empty"):
            return _predicate(path, "empty", "", negated=False)
        binary: tuple[tuple[tuple[str, ...], Operator, bool], ...] = (
            (("==",), "==", False),
            (("!=",), "==", True),
            (("contains",), "in", False),
            (("not", "contains"), "in", True),
            (("matches",), "matches", False),
            (("not", "matches"), "matches", True),
        )
        for words, operator, negated in binary:
            if self._take(*words):
                operand = self._next
                if operand.kind not in ("selector", "number", "string"):
                    raise self._unexpected()
                self._position += 1
                return _predicate(path, operator, self._value_of(operand), negated=negated)
        raise self._unexpected()

    def _selector(self) -> tuple[str, ...]:
        token = self._next
        if token.kind != "selector":
            raise self._unexpected()
        self._position += 1
        return self._field_path(token)

    def _field_path(self, token: _Token) -> tuple[str, ...]:
        path = _path(token.text)
        known = self._fields
        for name in path:
            if known is None:
                break
            if name not in known:
                raise _invalid(f'Selector "{".".join(path)}" is not valid')
            known = known[name]
        return path

    @staticmethod
    def _value_of(token: _Token) -> str:
        if token.kind == "string":
            return _unquote(token.text)
        return ".".join(_path(token.text)) if token.kind == "selector" else token.text


_MISSING = object()


def _predicate(path: tuple[str, ...], operator: Operator, operand: str, *, negated: bool) -> Predicate:
    """Whether the field at the path satisfies the operator; negation applies to each element a list on the way has."""
    pattern: Pattern | None = None
    if operator == "matches":
        try:
            pattern = Pattern(operand)
        except InvalidRequest as error:
            raise _invalid(str(error)) from error
    name = ".".join(path)

    def evaluate(value: object, depth: int) -> bool:
        for position in range(depth, len(path)):
            if isinstance(value, list | tuple):
                return any(evaluate(element, position) for element in value)
            if not isinstance(value, Mapping):
                raise _invalid(f'Selector "{name}" is not valid')
            value = value.get(path[position], _MISSING)
            if value is None or value is _MISSING:
                return (operator == "empty") != negated  # nothing there: empty, equal to nothing, containing nothing
        return _satisfies(value, operator, operand, pattern, name) != negated

    return lambda value: evaluate(value, 0)


def _satisfies(value: object, operator: Operator, operand: str, pattern: Pattern | None, name: str) -> bool:
    if isinstance(value, str):
        if operator == "==":
            return value == operand
        if operator == "in":
            return operand in value
        if pattern is not None:
            if len(value) > SUBJECT_CHARS_MAX:
                raise _invalid(f'"{name}" is longer than the {SUBJECT_CHARS_MAX} characters that matches can search')
            return pattern.search(value)
    elif isinstance(value, Mapping | list | tuple):
        if operator == "empty":
            return not value
        if operator == "in":
            if isinstance(value, Mapping):
                return operand in value
            return any(_equals(element, operand, name) for element in value)
    elif operator == "==":
        return _equals(value, operand, name)
    raise _invalid(f'Invalid match operator "{operator}" for selector "{name}"')


def _equals(value: object, operand: str, name: str) -> bool:
    """Whether the scalar equals the text read as its type."""
    try:
        if isinstance(value, str):
            return value == operand
        if isinstance(value, bool):
            if operand not in _TRUE | _FALSE:
                raise ValueError
            return value == (operand in _TRUE)
        if isinstance(value, int):
            return value == int(operand, 0)
        if isinstance(value, float):
            return value == float(operand)
    except ValueError:
        raise _invalid(f'value "{operand}" cannot be compared with the type of selector "{name}"') from None
    raise _invalid(f'Selector "{name}" is not valid')
