"""Regular expressions in RE2's syntax, matched in linear time.

The standard library's `re` backtracks, so that a short pattern from a request can occupy a server for hours. Here a
pattern becomes a list of states, and matching keeps the set of states that the text read so far can be in (Thompson,
"Regular expression search algorithm", CACM 1968): at most states times characters, whatever the pattern. Only whether
there is a match is answered, anywhere in the text as Go's MatchString does; there are no submatches.

Supported: literals, `.`, classes with ranges, negation, `[:alpha:]` and `\\d \\w \\s`, groups (plain, named, `(?:)`),
alternation, `* + ? {m,n}` with their lazy forms, `^ $ \\A \\z \\b \\B`, flags `i`, `s` and `m`, `\\Q..\\E`. Not
supported: `\\p{..}` and `\\C`. Back-references and lookaround do not exist in RE2 either.
"""

from collections.abc import Callable

from mesh.errors import InvalidRequest

PATTERN_CHARS_MAX = 1024
STATES_MAX = 1000  # after {m,n} is written out
STEPS_MAX = 5_000_000  # state visits of all searches of one pattern: about two seconds of one core
REPEAT_MAX = 1000  # as RE2
NESTING_MAX = 100

Matcher = Callable[[str], bool]

# Instructions: ("char", matcher) reads a character; ("jump", targets) goes on at each target without reading;
# ("assert", kind) goes on if the place satisfies it; ("match",) ends.
_Instruction = tuple[str, Matcher | None, tuple[int, ...] | str | None]

_POSIX: dict[str, str] = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": "\x00-\x7f",
    "blank": "\t ",
    "cntrl": "\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": "!-/:-@[-`{-~",
    "space": "\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_PERL = {"d": "digit", "w": "word"}
_ESCAPES = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}

Ranges = list[tuple[str, str]]


def _ranges(text: str) -> Ranges:
    """`a-z_` as ranges; only for the tables above, where a range's ends are never `-`."""
    ranges: Ranges = []
    at = 0
    while at < len(text):
        if text[at + 1 : at + 2] == "-" and at + 2 < len(text):
            ranges.append((text[at], text[at + 2]))
            at += 3
        else:
            ranges.append((text[at], text[at]))
            at += 1
    return ranges


def _perl_ranges(letter: str) -> Ranges:
    return _ranges("\t\n\f\r ") if letter == "s" else _ranges(_POSIX[_PERL[letter]])


def _negated(ranges: Ranges) -> Ranges:
    out: Ranges = []
    low = 0
    for first, last in sorted(ranges):
        if ord(first) > low:
            out.append((chr(low), chr(ord(first) - 1)))
        low = max(low, ord(last) + 1)
    if low <= 0x10FFFF:
        out.append((chr(low), chr(0x10FFFF)))
    return out


def _is_word(char: str) -> bool:
    return char.isascii() and (char.isalnum() or char == "_")


class Pattern:
    """A compiled pattern. Raises InvalidRequest when it is not valid or too large."""

    def __init__(self, text: str) -> None:
        if len(text) > PATTERN_CHARS_MAX:
            raise InvalidRequest(f"the regular expression is longer than {PATTERN_CHARS_MAX} characters")
        self.text = text
        self._program = _Compiler(text).program()
        self._steps = 0

    def search(self, subject: str) -> bool:
        """Whether the pattern matches anywhere in the subject.

        Raises InvalidRequest once all searches of this pattern together have cost more than STEPS_MAX.
        """
        current: set[int] = set()
        for at in range(len(subject) + 1):
            if self._follow(0, subject, at, current):
                return True
            if at == len(subject):
                return False
            following: set[int] = set()
            for state in current:
                kind, matcher, _ = self._program[state]
                reads = kind == "char" and matcher is not None and matcher(subject[at])
                if reads and self._follow(state + 1, subject, at + 1, following):
                    return True
            self._steps += len(current)
            if self._steps > STEPS_MAX:
                raise InvalidRequest(f"matching the regular expression takes too long: `{self.text}`")
            current = following
        return False

    def _follow(self, start: int, subject: str, at: int, states: set[int]) -> bool:
        """Adds the states that `start` leads to without reading; True when a match is among them."""
        stack = [start]
        while stack:
            state = stack.pop()
            if state in states:
                continue
            states.add(state)
            kind, _, argument = self._program[state]
            if kind == "match":
                return True
            if kind == "jump" and isinstance(argument, tuple):
                stack.extend(argument)
            elif kind == "assert" and isinstance(argument, str) and _holds(argument, subject, at):
                stack.append(state + 1)
        return False


def _holds(assertion: str, subject: str, at: int) -> bool:
    match assertion:
        case "start":
            return at == 0
        case "end":
            return at == len(subject)
        case "line start":
            return at == 0 or subject[at - 1] == "\n"
        case "line end":
            return at == len(subject) or subject[at] == "\n"
    before = at > 0 and _is_word(subject[at - 1])
    after = at < len(subject) and _is_word(subject[at])
    return (before != after) == (assertion == "boundary")


class _Compiler:
    """Recursive descent over the pattern; each method answers a fragment whose jumps are relative to its start."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._ignore_case = False
        self._dot_all = False
        self._lines = False

    def program(self) -> list[_Instruction]:
        fragment = self._alternatives()
        if self._at < len(self._text):
            raise self._error("unexpected )")
        return [*fragment, ("match", None, None)]

    def _error(self, why: str) -> InvalidRequest:
        return InvalidRequest(f"error parsing regexp: {why}: `{self._text}`")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, expected: str) -> bool:
        if self._text.startswith(expected, self._at):
            self._at += len(expected)
            return True
        return False

    def _bounded(self, fragment: list[_Instruction]) -> list[_Instruction]:
        if len(fragment) > STATES_MAX:
            raise self._error("expression too large")
        return fragment

    def _alternatives(self) -> list[_Instruction]:
        self._depth += 1
        if self._depth > NESTING_MAX:
            raise self._error("expression nests too deeply")
        flags = (self._ignore_case, self._dot_all, self._lines)
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        self._ignore_case, self._dot_all, self._lines = flags  # flags hold to the end of their group
        self._depth -= 1
        fragment = branches.pop()
        while branches:
            branch = branches.pop()
            fragment = self._bounded(
                [
                    _jump(1, len(branch) + 2),
                    *_moved(branch, 1),
                    _jump(len(branch) + 2 + len(fragment)),
                    *_moved(fragment, len(branch) + 2),
                ]
            )
        return fragment

    def _sequence(self) -> list[_Instruction]:
        fragment: list[_Instruction] = []
        while self._peek() not in ("", "|", ")"):
            piece = self._repeated()
            fragment = self._bounded([*fragment, *_moved(piece, len(fragment))])
        return fragment

    def _repeated(self) -> list[_Instruction]:
        fragment = self._atom()
        repeats = 0
        while bounds := self._repeat_bounds():
            repeats += 1
            if repeats > 1:
                raise self._error("invalid nested repetition operator")
            fragment = self._repeat(fragment, *bounds)
        return fragment

    def _repeat_bounds(self) -> tuple[int, int | None] | None:
        bounds: tuple[int, int | None]
        if self._take("*"):
            bounds = (0, None)
        elif self._take("+"):
            bounds = (1, None)
        elif self._take("?"):
            bounds = (0, 1)
        elif self._peek() == "{":
            end = self._text.find("}", self._at)
            low, comma, high = self._text[self._at + 1 : end].partition(",") if end > 0 else ("", "", "")
            if not _is_number(low) or (high and not _is_number(high)):
                return None  # a literal brace, as in RE2
            self._at = end + 1
            bounds = (int(low), int(high) if high else (None if comma else int(low)))
            if max(bounds[0], bounds[1] or 0) > REPEAT_MAX or (bounds[1] is not None and bounds[1] < bounds[0]):
                raise self._error("invalid repeat count")
        else:
            return None
        self._take("?")  # lazy or greedy: the same texts match
        return bounds

    def _repeat(self, fragment: list[_Instruction], low: int, high: int | None) -> list[_Instruction]:
        out: list[_Instruction] = []
        size = len(fragment)
        if (low + (high or 1)) * (size + 2) > STATES_MAX:
            raise self._error("expression too large")
        for _ in range(low):
            out += _moved(fragment, len(out))
        if high is None:
            start = len(out)
            return [*out, _jump(start + 1, start + size + 2), *_moved(fragment, start + 1), _jump(start)]
        end = len(out) + (high - low) * (size + 1)
        for _ in range(high - low):
            out += [_jump(len(out) + 1, end), *_moved(fragment, len(out) + 1)]
        return out

    def _atom(self) -> list[_Instruction]:
        char = self._peek()
        if char in ("*", "+", "?"):
            raise self._error(f"missing argument to repetition operator: {char}")
        self._at += 1
        match char:
            case "(":
                return self._group()
            case "[":
                return [self._class()]
            case ".":
                return [("char", (lambda _: True) if self._dot_all else (lambda one: one != "\n"), None)]
            case "^":
                return [("assert", None, "line start" if self._lines else "start")]
            case "$":
                return [("assert", None, "line end" if self._lines else "end")]
            case "\\":
                return self._escape()
        return [self._of_ranges([(char, char)])]

    def _group(self) -> list[_Instruction]:
        if self._take("?"):
            if self._take("P<") or self._take("<"):
                name, found, _ = self._text[self._at :].partition(">")
                if not found or not name or not all(map(_is_word, name)):
                    raise self._error("invalid named capture")
                self._at += len(name) + 1
            elif not self._take(":"):
                return self._flags()
        fragment = self._alternatives()
        if not self._take(")"):
            raise self._error("missing closing )")
        return fragment

    def _flags(self) -> list[_Instruction]:
        outer = (self._ignore_case, self._dot_all, self._lines)
        value = True
        while True:
            char = self._peek()
            self._at += 1
            match char:
                case "i":
                    self._ignore_case = value
                case "s":
                    self._dot_all = value
                case "m":
                    self._lines = value
                case "U":
                    pass  # swaps lazy and greedy
                case "-" if value:
                    value = False
                case ")":
                    return []  # for the rest of the enclosing group
                case ":":
                    fragment = self._alternatives()
                    if not self._take(")"):
                        raise self._error("missing closing )")
                    self._ignore_case, self._dot_all, self._lines = outer
                    return fragment
                case _:
                    raise self._error("invalid or unsupported Perl syntax")

    def _escape(self) -> list[_Instruction]:
        char = self._peek()
        if char and char in "AzbB":
            self._at += 1
            kind = {"A": "start", "z": "end", "b": "boundary", "B": "no boundary"}[char]
            return [("assert", None, kind)]
        if self._take("Q"):
            literal, found, _ = self._text[self._at :].partition("\\E")
            self._at += len(literal) + (2 if found else 0)
            return [self._of_ranges([(one, one)]) for one in literal]
        return [self._of_ranges(self._escaped_ranges())]

    def _escaped_ranges(self) -> Ranges:
        char = self._peek()
        self._at += 1
        if char and char in "dws":
            return _perl_ranges(char)
        if char and char in "DWS":
            return _negated(_perl_ranges(char.lower()))
        if char == "x":
            literal = self._hexadecimal()
        elif char in _ESCAPES:
            literal = _ESCAPES[char]
        elif char and char.isascii() and not char.isalnum():
            literal = char
        else:
            raise self._error(f"invalid escape sequence: `\\{char}`")
        return [(literal, literal)]

    def _hexadecimal(self) -> str:
        if self._take("{"):
            digits, found, _ = self._text[self._at :].partition("}")
            self._at += len(digits) + 1
        else:
            digits, found = self._text[self._at : self._at + 2], "2"
            self._at += 2
            if len(digits) != 2:
                raise self._error("invalid escape sequence: `\\x`")
        if not found or not 0 < len(digits) <= 8 or not all(one in "0123456789abcdefABCDEF" for one in digits):
            raise self._error("invalid escape sequence: `\\x`")
        value = int(digits, 16)
        if value > 0x10FFFF:
            raise self._error("invalid escape sequence: `\\x`")
        return chr(value)

    def _class(self) -> _Instruction:
        negated = self._take("^")
        ranges: Ranges = []
        first = True
        while first or self._peek() != "]":
            first = False
            if not self._peek():
                raise self._error("missing closing ]")
            if self._take("[:"):
                name, found, _ = self._text[self._at :].partition(":]")
                named = name.removeprefix("^")
                if not found or named not in _POSIX:
                    raise self._error("invalid character class range")
                self._at += len(name) + 2
                ranges += _negated(_ranges(_POSIX[named])) if name != named else _ranges(_POSIX[named])
                continue
            low = self._class_member()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._class_member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] < low[0][0]:
                    raise self._error("invalid character class range")
                low = [(low[0][0], high[0][1])]
            ranges += low
        self._at += 1
        return self._of_ranges(ranges, negated=negated)

    def _class_member(self) -> Ranges:
        if self._take("\\"):
            return self._escaped_ranges()
        char = self._peek()
        self._at += 1
        return [(char, char)]

    def _of_ranges(self, ranges: Ranges, *, negated: bool = False) -> _Instruction:
        def contains(char: str) -> bool:
            return any(low <= char <= high for low, high in ranges)

        def contains_any_case(char: str) -> bool:
            return contains(char) or contains(char.lower()) or contains(char.upper())

        inner = contains_any_case if self._ignore_case else contains
        return ("char", (lambda char: not inner(char)) if negated else inner, None)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _jump(*targets: int) -> _Instruction:
    return ("jump", None, targets)


def _moved(fragment: list[_Instruction], by: int) -> list[_Instruction]:
    return [
        (kind, matcher, tuple(target + by for target in argument) if isinstance(argument, tuple) else argument)
        for kind, matcher, argument in fragment
    ]
