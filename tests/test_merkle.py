"""The Merkle tree against the definitions of RFC 6962, section 2.1, written down as they stand there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope.ledger.merkle import Frontier, audit_paths, leaf, root_of
from tests import strategies as _house  # noqa: F401  (the profile)

#: The leaves, roots and paths that the tests of Certificate Transparency have used since 2013.
LEAVES = [
    bytes.fromhex(data)
    for data in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
PATHS = {
    0: [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    5: [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
}


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def split(size: int) -> int:
    """The largest power of two below."""
    k = 1
    while k * 2 < size:
        k *= 2
    return k


def mth(data: Sequence[bytes]) -> bytes:
    if not data:
        return hashlib.sha256(b"").digest()
    if len(data) == 1:
        return hashlib.sha256(b"\x00" + data[0]).digest()
    k = split(len(data))
    return node(mth(data[:k]), mth(data[k:]))


def path(index: int, data: Sequence[bytes]) -> list[bytes]:
    if len(data) == 1:
        return []
    k = split(len(data))
    if index < k:
        return [*path(index, data[:k]), mth(data[k:])]
    return [*path(index - k, data[k:]), mth(data[:k])]


def frontier(data: Sequence[bytes]) -> Frontier:
    grown = Frontier()
    for one in data:
        grown.append(one)
    return grown


def hashes(size: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(size)]


sizes = st.integers(0, 70)


def test_known_roots_and_paths() -> None:
    assert Frontier().root.hex() == audit_paths([], [])[0].hex() == EMPTY
    for size, root in enumerate(ROOTS, start=1):
        assert frontier(LEAVES[:size]).root.hex() == root == mth(LEAVES[:size]).hex()
    root, paths = audit_paths(LEAVES, PATHS)
    assert root.hex() == ROOTS[7]
    assert {index: [hash.hex() for hash in found] for index, found in paths.items()} == PATHS
    assert leaf(b"") == bytes.fromhex(ROOTS[0])


@given(sizes)
def test_root_and_paths_are_those_of_the_definition(size: int) -> None:
    data = hashes(size)
    root, paths = audit_paths(iter(data), range(size))
    assert root == frontier(data).root == mth(data)
    for index in range(size):
        assert paths[index] == path(index, data)
        assert root_of(data[index], index, size, paths[index]) == root


@given(sizes, sizes)
def test_a_stored_frontier_is_extended_as_if_it_had_never_been_away(first: int, more: int) -> None:
    data = hashes(first + more)
    before = frontier(data[:first])
    after = Frontier(before.size, list(before.peaks))
    for one in data[first:]:
        after.append(one)
    whole = frontier(data)
    assert (after.size, after.peaks, after.root) == (whole.size, whole.peaks, whole.root)
    assert [mth(data[start:end]) for start, end in whole.ranges] == whole.peaks


@given(st.data(), st.integers(1, 70))
def test_nothing_else_leads_to_the_root(draw: st.DataObject, size: int) -> None:
    data = hashes(size)
    index = draw.draw(st.integers(0, size - 1))
    root, paths = audit_paths(data, [index])
    right = paths[index]

    def leads(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bool:
        try:
            return root_of(leaf, index, size, path) == root
        except ValueError:
            return False

    assert leads(data[index], index, size, right)
    assert not leads(b"another", index, size, right)
    other = draw.draw(st.integers(-1, size).filter(lambda other: other != index))
    assert not leads(data[index], other, size, right)
    assert not leads(data[index], index, size, [*right, data[0]])
    assert not leads(data[index], index, size, right[:-1]) or not right
    if right:
        place = draw.draw(st.integers(0, len(right) - 1))
        assert not leads(data[index], index, size, [*right[:place], bytes(32), *right[place + 1 :]])
    # A node is no leaf.
    if size > 1:
        assert mth([mth(data[: split(size)]) + mth(data[split(size) :])]) != root


@pytest.mark.parametrize(("size", "peaks"), [(1, 0), (0, 1), (3, 1), (4, 2), (-1, 0)])
def test_a_frontier_has_a_root_for_each_perfect_subtree(size: int, peaks: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Frontier(size, [bytes(32)] * peaks)


def test_a_leaf_that_is_not_there_has_no_path() -> None:
    with pytest.raises(ValueError, match="expected a leaf at 3"):
        audit_paths(hashes(3), [1, 3])
    with pytest.raises(ValueError, match="expected an index below 3"):
        root_of(b"", 3, 3, [])


def test_a_path_has_the_length_of_its_leaf() -> None:
    path = audit_paths(hashes(5), [1])[1][1]
    for wrong, said in ((path[:-1], "shorter"), ([*path, bytes(32)], "longer"), ([], "shorter")):
        with pytest.raises(ValueError, match=f"expected an audit path of that leaf, got a {said} one"):
            root_of(hashes(5)[1], 1, 5, wrong)
