"""One canonical form of a path."""

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ProtocolError
from mesh.http.path import normalize_path


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


def test_slashes_merge_when_asked():
    assert normalize_path(b"//a///b//", merge_slashes=True) == b"/a/b/"
    assert normalize_path(b"/a//../b", merge_slashes=True) == b"/b"
    assert normalize_path(b"/a//../b") == b"/a/b"


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


@given(PIECES, st.booleans())
def test_normalising_twice_changes_nothing(pieces, merge_slashes):
    path = b"/" + b"".join(pieces)
    try:
        once = normalize_path(path, merge_slashes=merge_slashes)
    except ProtocolError:
        return
    assert normalize_path(once, merge_slashes=merge_slashes) == once
    assert once.startswith(b"/")
    assert not any(segment in (b".", b"..") for segment in once.split(b"/"))


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
