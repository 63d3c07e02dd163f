"""What bounds the grant of a child: the nearest above that was granted the same, and what others take of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from execution_envelope.errors import InvalidField
from execution_envelope.ledger.commit import Siblings
from execution_envelope.lifecycle import Granted, Violation
from execution_envelope.record import Record
from execution_envelope.resources import Amount, add, exceeds, human
from execution_envelope.tree import Tree, minus

#: How many envelopes a tree may have that is read, and how many levels.
MAX_TREE: Final = 20_000
MAX_LEVELS: Final = 64
#: Of how many envelopes a process remembers that it admitted parts of them.
MAX_PARENTS: Final = 100_000


class Reads(Protocol):
    """What trees are read with: `ended` are trees of which everything has ended, as they were last read."""

    ended: dict[str, Tree]

    async def read(self, *reference: str) -> Record: ...
    async def children(self, id: str) -> Sequence[str]: ...
    def remember_ended(self, tree: Tree) -> None: ...


async def read_tree(journal: Reads, id: str, *, fresh: bool = True) -> Tree:
    """An envelope with all that are part of it. Raises `NotFound`, and `InvalidField` for a tree beyond the limits.

    Unless it has to be `fresh`, what has ended with all below may be as it was when last read.
    """
    count = 0

    async def read(id: str, level: int) -> Tree:
        nonlocal count
        if not fresh and (known := journal.ended.get(id)) is not None:
            return known
        count += 1
        if count > MAX_TREE or level > MAX_LEVELS:
            raise InvalidField("part_of", f"expected a tree of up to {MAX_TREE} envelopes and {MAX_LEVELS} levels")
        record = await journal.read(id)
        below = [await read(child, level + 1) for child in await journal.children(record.id)]
        tree = Tree(record, tuple(below))
        if all(not one.is_open for _, one in tree.walk()):
            journal.remember_ended(tree)
        return tree

    return await read(id, 0)


async def open_children(journal: Reads, id: str) -> list[str]:
    """The open envelopes below, those directly below first; of one that is open not those below it too."""
    found, above = [], [id]
    for parent in above:
        for child in await journal.children(parent):
            if child in journal.ended:
                continue
            record = await journal.read(child)
            if record.is_open:
                found.append(child)
            elif record.state != "completed":  # nothing was open below a clean end
                above.append(child)
    return found


class Parts:
    """Of which envelopes this process admitted parts."""

    def __init__(self) -> None:
        self._parents: set[str] = set()

    def admitted(self, parent: str) -> None:
        """A part of this one is about to be sealed."""
        if len(self._parents) < MAX_PARENTS:
            self._parents.add(parent)

    def may_be_of(self, id: str) -> bool:
        """Whether any was; where there were too many to remember it may be."""
        return id in self._parents or len(self._parents) >= MAX_PARENTS


class Family:
    """Those above one child, the nearest first, each with all that are part of it, as they were at one look."""

    def __init__(self, child: Record, above: tuple[Tree, ...]) -> None:
        self._child = child
        self._above = above

    @classmethod
    async def of(cls, journal: Reads, child: Record, *, fresh: bool) -> Family:
        """The family of an envelope that is part of another."""
        path: list[str] = []
        parent = child.envelope.correlation.part_of
        while parent is not None and len(path) < MAX_LEVELS:
            path.append(parent)
            parent = (await journal.read(parent)).envelope.correlation.part_of
        tree = await read_tree(journal, path[-1], fresh=fresh)
        above = [tree]
        for id in reversed(path[:-1]):
            tree = next((one for one in tree.children if one.record.id == id), None) or await read_tree(journal, id)
            above.append(tree)
        return cls(child, tuple(reversed(above)))

    def left(self) -> dict[str, Amount]:
        """Resource -> what may be granted to the child, of all that any above it was granted."""
        found: dict[str, Amount] = {}
        for tree in self._above:
            for name in tree.record.granted:
                if name not in found:
                    found[name] = minus(tree.bound(name), tree.shared(name, without=self._child.id))
        return found

    def beyond(self, fact: Granted) -> list[Violation]:
        """Where a grant to the child goes beyond that."""
        held, found = self._child.with_grant(fact), []
        # An envelope that this grant is going to end holds nothing any more.
        ends = self._child.envelope.correlation.supersedes if self._child.state == "admitted" else None
        for name, given in held.items():
            tree = next((one for one in self._above if name in one.record.granted), None)
            if tree is None:
                continue
            bound = tree.bound(name)
            total = add([given, tree.shared(name, without=self._child.id, ends=ends)])
            if given and exceeds(total, bound):  # nothing more is never too much
                parent = f"parent {tree.record.id}"
                text = f"{name} {human(name, total)} is beyond the {human(name, bound)} that {parent} was granted"
                found.append(Violation(name, bound, total, parent, text))
        return found

    def siblings(self) -> tuple[Siblings, ...]:
        """What was read: the ledger refuses the write when any of it has changed meanwhile."""
        outermost = self._above[-1]
        nearest = self._above[0].record.id
        return tuple(
            Siblings(node.record.id, {one.id: one.next_sequence for one in _members(node) if one.id != self._child.id})
            for node in _nodes(outermost)
            if node.record.id == nearest or (node.children and node.record.is_open)
        )


def _members(node: Tree) -> Iterator[Record]:
    yield node.record
    yield from (child.record for child in node.children)


def _nodes(tree: Tree) -> Iterator[Tree]:
    yield tree
    for child in tree.children:
        yield from _nodes(child)
