"""Merkle trees as in RFC 6962, section 2.1, over SHA-256: a root, and for each leaf the path that leads to it.

Leaves come one after the other, and no tree is kept: only the roots of its perfect subtrees, one for each bit of its
size, which can be stored and extended later. Written here because what is on PyPI brings its own storage, is licensed
otherwise (pymerkle: GPL, and an exact pin of another package) or is not kept up; the definition fits into a page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple


def leaf(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """A tree as far as it has grown: its `size`, and the roots of its perfect subtrees from left to right.

    Raises `ValueError` when there are not as many roots as a tree of that size has.
    """

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self.peaks = list(peaks)
        if size < 0 or len(self.peaks) != size.bit_count():
            raise ValueError(f"expected {max(size, 0).bit_count()} roots of a tree of {size}, got {len(self.peaks)}")

    def append(self, data: bytes) -> None:
        """Add a leaf."""
        hash, size = leaf(data), self.size
        while size & 1:
            hash, size = _node(self.peaks.pop(), hash), size >> 1
        self.peaks.append(hash)
        self.size += 1

    @property
    def root(self) -> bytes:
        """The root; of an empty tree the hash of nothing."""
        if not self.peaks:
            return hashlib.sha256().digest()
        *others, root = self.peaks
        for peak in reversed(others):
            root = _node(peak, root)
        return root

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The first leaf of each perfect subtree, and the first one behind it."""
        bounds = [0]
        for bit in reversed(range(self.size.bit_length())):
            if self.size >> bit & 1:
                bounds.append(bounds[-1] + (1 << bit))
        return list(pairwise(bounds))


class _Subtree(NamedTuple):
    """The root of some leaves next to each other, how many, and the paths up to it of those that are asked for."""

    hash: bytes
    size: int
    paths: dict[int, list[bytes]]

    def beside(self, right: _Subtree) -> _Subtree:
        for path in self.paths.values():
            path.append(right.hash)
        for path in right.paths.values():
            path.append(self.hash)
        return _Subtree(_node(self.hash, right.hash), self.size + right.size, self.paths | right.paths)


def audit_paths(leaves: Iterable[bytes], indices: Collection[int]) -> tuple[bytes, dict[int, list[bytes]]]:
    """The root of a tree, and the audit path of each of its leaves at `indices`, in one pass.

    Raises `ValueError` where there are fewer leaves.
    """
    stack: list[_Subtree] = []
    wanted = set(indices)
    for index, data in enumerate(leaves):
        tree = _Subtree(leaf(data), 1, {index: []} if index in wanted else {})
        while stack and stack[-1].size == tree.size:
            tree = stack.pop().beside(tree)
        stack.append(tree)
    while len(stack) > 1:
        right = stack.pop()
        stack.append(stack.pop().beside(right))
    found = stack[0].paths if stack else {}
    if wanted - found.keys():
        raise ValueError(f"expected a leaf at {min(wanted - found.keys())}, there are fewer")
    return (stack[0].hash if stack else Frontier().root), found


def root_of(data: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that an audit path leads to from a leaf. Raises `ValueError` for a path that no such leaf has.

    RFC 9162, section 2.1.3.2: whoever knows the root compares.
    """
    if not 0 <= index < size:
        raise ValueError(f"expected an index below {size}, got {index}")
    hash, last = leaf(data), size - 1
    for sibling in path:
        if not last:
            raise ValueError("expected an audit path of that leaf, got a longer one")
        if index & 1 or index == last:
            hash = _node(sibling, hash)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            hash = _node(hash, sibling)
        index, last = index >> 1, last >> 1
    if last:
        raise ValueError("expected an audit path of that leaf, got a shorter one")
    return hash
