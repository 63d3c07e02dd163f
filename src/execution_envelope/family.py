"""What bounds the grant of a child: the nearest above that was granted the same, and what others take of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from execution_envelope.errors import InvalidField
from execution_envelope.ledger.commit import Siblings
from execution_envelope.lifecycle import Granted, Violation
from execution_envelope.record import Record
from execution_envelope.resources import Amount, add, exceeds, human
from execution_envelope.tree import Covered, Past, Tree, minus

#: How many envelopes a tree may have that is read, and how many levels.
MAX_TREE: Final = 20_000
MAX_LEVELS: Final = 64
#: Of how many envelopes a process remembers that it admitted parts of them.
MAX_PARENTS: Final = 100_000


class Cut(Tree):
    """A tree of which not all was read, because it is beyond the limits."""

    def covered(self, account: str, name: str) -> Covered:
        """Nobody knows what those came to that were left out."""
        found = Tree.covered(self, account, name)
        return found._replace(parts=found.parts + 1, unknown=found.unknown + 1)


class Reads(Protocol):
    """What trees are read with: `ended` are trees of which everything has ended, as they were last read."""

    @property
    def ended(self) -> Mapping[str, Tree]: ...
    async def read(self, *reference: str) -> Record: ...
    async def children(self, id: str) -> Sequence[str]: ...
    def remember_ended(self, tree: Tree) -> None: ...


async def read_tree(journal: Reads, id: str, *, fresh: bool = True, whole: bool = True) -> Tree:
    """An envelope with all that are part of it. Raises `NotFound`, and `InvalidField` for a tree beyond the limits;
    unless it has to be the `whole`: what is beyond them is left out then, and what it came to is unknown.

    Unless it has to be `fresh`, what has ended with all below may be as it was when last read.
    """
    count, cut = 0, False
    ended: set[str] = set()

    async def read(id: str, level: int) -> Tree:
        nonlocal count, cut
        if not fresh and (known := journal.ended.get(id)) is not None:
            ended.add(id)
            return known
        count += 1
        record = await journal.read(id)
        below = []
        for child in await journal.children(record.id):
            if count < MAX_TREE and level + 1 < MAX_LEVELS:
                below.append(await read(child, level + 1))
            elif whole:
                raise _too_large()
            else:
                cut = True
                break
        tree = Tree(record, tuple(below))
        if not (cut or record.is_open) and all(child.record.id in ended for child in below):
            ended.add(record.id)
            journal.remember_ended(tree)
        return tree

    tree = await read(id, 0)
    return Cut(tree.record, tree.children) if cut else tree


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


class Ended(Mapping[str, Tree]):
    """Trees of which everything has ended, of up to `MAX_TREE` envelopes together: those looked at last.

    In them only what was used can change. Looked up by the id of the root.
    """

    def __init__(self) -> None:
        self._trees: dict[str, Tree] = {}
        #: Envelope -> the root that it is kept with.
        self._roots: dict[str, str] = {}

    def __getitem__(self, id: str) -> Tree:
        tree = self._trees[id] = self._trees.pop(id)  # last looked at, last forgotten
        return tree

    def __contains__(self, id: object) -> bool:
        return id in self._trees

    def __iter__(self) -> Iterator[str]:
        return iter(self._trees)

    def __len__(self) -> int:
        return len(self._trees)

    def add(self, tree: Tree) -> None:
        """Keep a tree, and none of those below it beside it."""
        for child in tree.children:
            self.forget(child.record.id)
        self.forget(tree.record.id)
        kept = _past(tree)
        self._trees[kept.record.id] = kept
        self._roots |= {record.id: kept.record.id for _, record in kept.walk()}
        while len(self._roots) > MAX_TREE:
            self.forget(next(iter(self._trees)))

    def forget(self, id: str) -> None:
        """Of this envelope something was recorded: the tree that it is in is no longer known."""
        tree = self._trees.pop(self._roots.get(id, id), None)
        for _, record in () if tree is None else tree.walk():
            del self._roots[record.id]


def _past(tree: Tree) -> Tree:
    record = tree.record if isinstance(tree.record, Past) else Past(tree.record)
    return Tree(record, tuple(_past(child) for child in tree.children))


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
    """Those above one envelope, the nearest first, each with all that are part of it, and it with its own parts, as
    they were at one look. `own` is None where it is not known of any."""

    def __init__(self, child: Record, above: tuple[Tree, ...], own: Tree | None) -> None:
        self._child = child
        self._above = above
        self._own = own

    @classmethod
    async def of(cls, journal: Reads, child: Record, *, fresh: bool) -> Family:
        """The family of an envelope. Raises `InvalidField` for one that is beyond the limits of a tree."""
        path: list[str] = []
        parent = child.envelope.correlation.part_of
        while parent is not None:
            if len(path) + 1 >= MAX_LEVELS:
                raise _too_large()
            path.append(parent)
            parent = (await journal.read(parent)).envelope.correlation.part_of
        if not path:
            return cls(child, (), await read_tree(journal, child.id, fresh=fresh))
        tree = await read_tree(journal, path[-1], fresh=fresh)
        above = [tree]
        for id in reversed(path[:-1]):
            tree = next((one for one in tree.children if one.record.id == id), None) or await read_tree(journal, id)
            above.append(tree)
        own = next((one for one in tree.children if one.record.id == child.id), None)
        return cls(child, tuple(reversed(above)), own)

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
            # What nobody knows of one of them is no room for another.
            total = add([given, tree.shared(name, without=self._child.id, ends=ends, known=True)])
            if given and exceeds(total, bound):  # nothing more is never too much
                parent = f"parent {tree.record.id}"
                text = f"{name} {human(name, total)} is beyond the {human(name, bound)} that {parent} was granted"
                found.append(Violation(name, bound, total, parent, text))
        return [*found, *self._below(held)]

    def _below(self, held: Mapping[str, Amount]) -> list[Violation]:
        """Where those below take more than it would hold, of what this changes."""
        found, before = [], self._child.held
        for name, bound in held.items():
            if self._own is None or not self._own.children or before.get(name) == bound:
                continue
            total = self._own.shared(name, without=None, known=True)
            if exceeds(total, bound):
                children = f"children of {self._child.id}"
                text = f"{name} {human(name, total)} that {children} take is beyond the {human(name, bound)} granted"
                found.append(Violation(name, bound, total, children, text))
        return found

    def siblings(self) -> tuple[Siblings, ...]:
        """What was read: the ledger refuses the write when any of it has changed meanwhile.

        Where something is open, a part may be added; where something has ended, a report may come late.
        """
        outermost = self._above[-1] if self._above else self._own
        return tuple(
            Siblings(node.record.id, {one.id: one.next_sequence for one in _members(node) if one.id != self._child.id})
            for node in ([] if outermost is None else _nodes(outermost))
            if node.children or node.record.is_open
        )


def _too_large() -> InvalidField:
    return InvalidField("part_of", f"expected a tree of up to {MAX_TREE} envelopes and {MAX_LEVELS} levels")


def _members(node: Tree) -> Iterator[Record]:
    yield node.record
    yield from (child.record for child in node.children)


def _nodes(tree: Tree) -> Iterator[Tree]:
    yield tree
    for child in tree.children:
        yield from _nodes(child)
