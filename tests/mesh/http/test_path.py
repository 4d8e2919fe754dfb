"""One canonical form of a path."""

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ProtocolError
from mesh.http.h1 import ClientConnection, Rejected, ServerConnection
from mesh.http.path import PathPolicy, PathRedirect, normalize_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/", b"/"),
        (b"/a/b", b"/a/b"),
        (b"/a/./b", b"/a/b"),
        (b"/a/../b", b"/b"),
        (b"/a/b/..", b"/a/"),
        (b"/a/b/.", b"/a/b/"),
        (b"/./a", b"/a"),
        (b"/a/%2e%2E/b", b"/b"),
        (b"/a/%2e./b", b"/b"),
        (b"/a\\..\\b", b"/b"),
        (b"/%61%7eb", b"/a~b"),
        (b"/a%2fb", b"/a%2Fb"),
        (b"/a//b", b"/a//b"),
        (b"/a/..b", b"/a/..b"),
        (b"/.a", b"/.a"),
        (b"/%252e%252e/a", b"/%252e%252e/a"),
    ],
)
def test_canonical(path, expected):
    assert normalize_path(path) == expected


MERGING = PathPolicy(merge_slashes=True)


def test_slashes_merge_when_asked():
    assert normalize_path(b"//a///b//", MERGING) == b"/a/b/"
    assert normalize_path(b"/a//../b", MERGING) == b"/b"
    assert normalize_path(b"/a//../b") == b"/a/b"


@pytest.mark.parametrize(
    ("path", "kept", "unescaped"),
    [
        (b"/a%2fb", b"/a%2Fb", b"/a/b"),
        (b"/a%5cb", b"/a%5Cb", b"/a/b"),
        (b"/a/%2e%2e%2fb", b"/a/..%2Fb", b"/b"),
        (b"/a%2f..%2Fb", b"/a%2F..%2Fb", b"/b"),
        (b"/a%252fb", b"/a%252fb", b"/a%252fb"),  # what is decoded once does not decode again
        (b"/a%2f%2fb", b"/a%2F%2Fb", b"/a//b"),
    ],
)
def test_escaped_slashes_are_what_the_policy_says(path, kept, unescaped):
    assert normalize_path(path, PathPolicy(escaped_slashes="keep")) == kept
    assert normalize_path(path, PathPolicy(escaped_slashes="unescape")) == unescaped
    if kept == unescaped:
        for choice in ("reject", "redirect"):
            assert normalize_path(path, PathPolicy(escaped_slashes=choice)) == kept
        return
    with pytest.raises(ProtocolError):
        normalize_path(path, PathPolicy(escaped_slashes="reject"))
    with pytest.raises(PathRedirect) as redirect:
        normalize_path(path, PathPolicy(escaped_slashes="redirect"))
    assert redirect.value.path == unescaped


def test_unescaped_slashes_merge_after_that():
    assert normalize_path(b"/a%2F%2f/b", PathPolicy(merge_slashes=True, escaped_slashes="unescape")) == b"/a/b"


@pytest.mark.parametrize("path", [b"/%2fevil.example/", b"//evil.example%2f", b"/a/..%2f/evil.example"])
def test_a_redirect_never_names_another_host(path):
    with pytest.raises(ProtocolError):
        normalize_path(path, PathPolicy(escaped_slashes="redirect"))


def test_backslashes_are_slashes_or_refused():
    assert normalize_path(b"/a\\b") == b"/a/b"
    strict = PathPolicy(escaped_slashes="unescape", backslashes="reject")
    for path in (b"/a\\b", b"/a%5Cb"):
        with pytest.raises(ProtocolError):
            normalize_path(path, strict)


@pytest.mark.parametrize(
    "path", [b"/..", b"/../a", b"/a/../..", b"/%2e%2e/a", b"/a%00b", b"/a%", b"/a%zz", b"/%%32e%%32e/a"]
)
def test_refused(path):
    with pytest.raises(ProtocolError):
        normalize_path(path)


PIECES = st.lists(
    st.sampled_from([b"/", b".", b"..", b"a", b"%2e", b"%2E", b"%2f", b"%5c", b"\\", b"%61", b"b", b"%", b"//"]),
    max_size=12,
)


POLICIES = st.builds(
    PathPolicy,
    merge_slashes=st.booleans(),
    escaped_slashes=st.sampled_from(["keep", "reject", "unescape", "redirect"]),
    backslashes=st.sampled_from(["slash", "reject"]),
)


@given(PIECES, POLICIES)
def test_normalising_twice_changes_nothing(pieces, policy):
    path = b"/" + b"".join(pieces)
    try:
        once = normalize_path(path, policy)
    except PathRedirect as redirect:
        once = redirect.path  # where the caller is sent must be served, not sent on
    except ProtocolError:
        return
    assert normalize_path(once, policy) == once
    assert once.startswith(b"/")
    assert not any(segment in (b".", b"..") for segment in once.split(b"/"))
    assert b"\\" not in once
    if policy.merge_slashes:
        assert b"//" not in once
    if policy.escaped_slashes != "keep":
        assert b"%2F" not in once
        assert b"%5C" not in once


@given(PIECES, POLICIES)
def test_the_bytes_judged_are_the_bytes_sent_and_read_as_the_same_again(pieces, policy):
    sent = b"GET /%b?q HTTP/1.1\r\nHost: a\r\n\r\n" % b"".join(pieces)
    head = ServerConnection(policy).receive_data(sent)[0]
    if isinstance(head, Rejected):
        assert head.status == (307 if head.location else 400)
        return
    forwarded = ClientConnection().send_request(head)
    assert forwarded.startswith(b"GET %b?q HTTP/1.1\r\n" % head.path)
    assert ServerConnection(policy).receive_data(forwarded)[0].path == head.path


def test_a_receiver_answers_with_the_redirect():
    connection = ServerConnection(PathPolicy(escaped_slashes="redirect"))
    (rejected,) = connection.receive_data(b"GET /a%2Fb?c=%2F HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = connection.reject(rejected)
    assert answer.startswith(b"HTTP/1.1 307 Temporary Redirect\r\n")
    assert b"\r\nlocation: /a/b?c=%2F\r\n" in answer


@given(st.lists(st.sampled_from(["a", "b", ".", "..", "c"]), max_size=8))
def test_agrees_with_a_naive_version(segments):
    path = "/" + "/".join(segments)
    depth = 0
    for segment in segments:
        depth += {".": 0, "..": -1}.get(segment, 1)
        if depth < 0:
            with pytest.raises(ProtocolError):
                normalize_path(path.encode())
            return
    directory = path != "/" and segments[-1] in (".", "..")
    naive = posixpath.normpath(path)
    assert normalize_path(path.encode()).decode() == (naive.rstrip("/") + "/" if directory else naive)
