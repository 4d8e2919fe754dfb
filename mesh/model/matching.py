"""Conditions of `match` compiled to functions, once, so that a request pays only for comparing."""

from collections.abc import Callable

from mesh.errors import ConfigError, InvalidRequest
from mesh.model.match import NamedMatch, PathMatch, StringMatch
from mesh.model.pattern import Pattern

StringCheck = Callable[[bytes | None], bool]
PathCheck = Callable[[bytes], bool]
HeadersCheck = Callable[[tuple[tuple[bytes, bytes], ...]], bool]


def compile_pattern(text: str, *, ignore_case: bool = False) -> Pattern:
    """An RE2 pattern. Raises ConfigError with RE2's reason."""
    try:
        return Pattern(f"(?i:{text})" if ignore_case else text)
    except InvalidRequest as error:
        raise ConfigError(f"regular expression {text!r}: {error}") from error


def _compile_present_string(match: StringMatch) -> PathCheck:
    """For a text that is there, without `invert`."""
    if match.kind == "regex":
        return compile_pattern(match.value, ignore_case=match.ignore_case).fullmatch
    value = match.value.encode()
    if match.ignore_case:
        value = value.lower()
        match match.kind:
            case "exact":
                return lambda text: text.lower() == value
            case "prefix":
                return lambda text: text.lower().startswith(value)
            case "suffix":
                return lambda text: text.lower().endswith(value)
            case "contains":
                return lambda text: value in text.lower()
            case _:
                return lambda _: True
    match match.kind:
        case "exact":
            return lambda text: text == value
        case "prefix":
            return lambda text: text.startswith(value)
        case "suffix":
            return lambda text: text.endswith(value)
        case "contains":
            return lambda text: value in text
        case _:
            return lambda _: True


def compile_string(match: StringMatch) -> StringCheck:
    """A function that says whether a text fulfils the condition; None stands for no text.

    Raises ConfigError for a bad regular expression.
    """
    check = _compile_present_string(match)
    if match.invert:
        return lambda text: text is None or not check(text)
    return lambda text: text is not None and check(text)


def compile_path(match: PathMatch) -> PathCheck:
    """A function that says whether a normalised path fulfils the condition. Raises ConfigError for a bad regex."""
    if match.kind == "regex":
        return compile_pattern(match.value, ignore_case=match.ignore_case).fullmatch
    if match.kind == "segment":
        value = match.value.encode().rstrip(b"/")
        below = value + b"/"
        if match.ignore_case:
            value, below = value.lower(), below.lower()
            return lambda path: (lower := path.lower()) == value or lower.startswith(below)
        return lambda path: path == value or path.startswith(below)
    return _compile_present_string(StringMatch(match.kind, match.value, match.ignore_case))


def joined_value(headers: tuple[tuple[bytes, bytes], ...], name: bytes) -> bytes | None:
    """All values of a header as one (RFC 9110 5.2; Cookie: RFC 9113 8.2.3), or None."""
    found: bytes | None = None
    for candidate, value in headers:
        if candidate == name:
            found = value if found is None else found + (b"; " if name == b"cookie" else b",") + value
    return found


def _compile_header(match: NamedMatch) -> HeadersCheck:
    name = match.name.lower().encode()
    if not name or name.startswith(b":"):
        raise ConfigError(f"header {match.name!r} cannot be matched as a header: use methods, path or authorities")
    if match.match.kind == "present":
        if match.match.invert:
            return lambda headers: all(candidate != name for candidate, _ in headers)
        return lambda headers: any(candidate == name for candidate, _ in headers)
    check = compile_string(match.match)
    return lambda headers: check(joined_value(headers, name))


def compile_headers(matches: tuple[NamedMatch, ...]) -> HeadersCheck:
    """A function that says whether all conditions hold of a head's headers. Raises ConfigError for a bad regex."""
    checks = tuple(_compile_header(match) for match in matches)
    if len(checks) == 1:
        return checks[0]
    return lambda headers: all(check(headers) for check in checks)
