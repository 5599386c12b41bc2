"""The bounded set: who is in it, and who leaves for a new member."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.oldest import OldestFirst


class OldestFirstTests(SynchronousTestCase):
    """A set with room for three."""

    def setUp(self) -> None:
        self.members: OldestFirst[str] = OldestFirst(3)
        for member in "abc":
            self.assertIsNone(self.members.add(member))

    def test_the_oldest_leaves_for_a_new_member(self) -> None:
        """A full set lets its oldest member go, and says which one that was."""
        self.assertEqual([self.members.add("d"), self.members.add("e")], ["a", "b"])
        self.assertEqual([*self.members], ["c", "d", "e"])

    def test_a_discarded_member_makes_room(self) -> None:
        """A member that is gone costs no other its place; a stranger is nothing to discard."""
        self.members.discard("b")
        self.members.discard("x")
        self.assertIsNone(self.members.add("d"))
        self.assertEqual(([*self.members], len(self.members)), (["a", "c", "d"], 3))

    def test_members_may_leave_while_they_are_visited(self) -> None:
        """Each member of the moment is visited, whatever the visit does to the set."""
        visited = []
        for member in self.members:
            visited.append(member)
            self.members.discard(member)
        self.assertEqual((visited, len(self.members)), (["a", "b", "c"], 0))
