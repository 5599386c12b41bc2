"""The file that ties clients to their agencies: what it may hold, and when it is read."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.edge.agencies import Agencies, AgenciesError, parse_agencies
from tests.support.builders import texts
from tests.support.strategies import I32

# As the log shows names: printable, and without spaces at their ends. A name that reads like a whole
# line with a comment is such a line.
NAMES = (
    st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1)
    .map(str.strip)
    .filter(lambda name: name and not re.search(r"^#|=\s*[+-]?[0-9]+\s*#", name))
)
SPACES = st.sampled_from(("", " ", "\t", "  "))
COMMENTS = st.sampled_from(("", "#", " # 1 = 2", "\t#cafe"))


class ParserTests(SynchronousTestCase):
    """The content of the file."""

    @given(
        st.dictionaries(NAMES, I32),
        st.lists(st.tuples(SPACES, SPACES, COMMENTS), min_size=1),
        st.sampled_from(("\n", "\r\n", "\n\n", "\n # cafe = 3\n")),
    )
    @example({"a = 1 = b": 2, "Café #7": -1}, [("", " ", " # c = 3")], "\n")
    def test_all_lines_are_read(
        self, ids: dict[str, int], styles: list[tuple[str, str, str]], end: str
    ) -> None:
        """Any printable name may stand there, whatever spaces and comments stand around it."""
        lines = [
            f"{before}{name}{between}={between}{agency_id}{comment}"
            for (name, agency_id), (before, between, comment) in zip(
                ids.items(), styles * len(ids)
            )
        ]
        self.assertEqual(parse_agencies(end.join(lines) + end), ids)

    @given(st.text(st.sampled_from("ab=#+-19 \n\r\t\0é"), max_size=40))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        """What cannot be read is refused in one line that names the line of the file."""
        try:
            ids = parse_agencies(text)
        except ValueError as error:
            self.assertRegex(str(error), r"\Aline \d+[^\n]+\Z")
        else:
            self.assertTrue(all(name == name.strip() for name in ids))

    def test_mistakes_are_named(self) -> None:
        """The text says what is wrong in which line, and does not quote it."""
        for text, error in (
            ("a = 1\nb 2\n", "line 2 is not: common name = agency id"),
            ("= 1", "line 1 is not: common name = agency id"),
            ("a = 1.0", "line 1 is not: common name = agency id"),
            ("a = ", "line 1 is not: common name = agency id"),
            ("a = " + "9" * 5000, "line 1 is not: common name = agency id"),
            (
                "# ours\na = 2147483648",
                "line 2: an agency id is a number from -2147483648 to 2147483647",
            ),
            ("a = 1\n\nb = 1\na=1", "line 4 names the client of line 1 again"),
        ):
            self.assertEqual(str(self.assertRaises(ValueError, parse_agencies, text)), error)

    def test_several_clients_may_be_of_one_agency(self) -> None:
        """Names are unique, ids are not."""
        self.assertEqual(parse_agencies("till 1 = 7\ntill 2 = 7\n"), {"till 1": 7, "till 2": 7})


class FileTests(SynchronousTestCase):
    """The file at the start and at a reload."""

    def setUp(self) -> None:
        self.path = Path(self.mktemp()).absolute()

    def test_a_client_is_found_by_its_name(self) -> None:
        """A client that the file does not list, or without a name, has no agency."""
        self.path.write_bytes("\ufeffcafé = 7\n".encode())
        agencies = Agencies(str(self.path))
        self.assertEqual([agencies.find(name) for name in ("café", "cafe", None)], [7, None, None])

    def test_a_bad_file_is_one_line(self) -> None:
        """It begins with the option and the file, and names the remedy."""
        for content, problem in (
            (None, "No such file or directory: name a file that this process may read"),
            (b"caf\xe9 = 7", "it is not UTF-8: save it as such"),
            (b"a\nb = 1", "line 1 is not: common name = agency id"),
            (b"# none yet\n", "there is no agency in it, and every client would be refused: .*"),
        ):
            if content is not None:
                self.path.write_bytes(content)
            error = self.assertRaises(AgenciesError, Agencies, str(self.path))
            self.assertRegex(str(error), rf"\A--agencies {self.path}: {problem}\Z")

    def test_a_reload_takes_the_file_as_it_is_now(self) -> None:
        """The log says how many clients it lists."""
        self.path.write_text("a = 1")
        agencies = Agencies(str(self.path))
        self.path.write_text("b = 2\nc = 2")
        with capturedLogs() as events:
            agencies.reload()
        self.assertEqual([agencies.find(name) for name in "abc"], [None, 2, 2])
        (line,) = texts(list(events), LogLevel.info)
        expected = f"action: reload | result: success | agencies: {self.path} | clients: 2"
        self.assertEqual(line, expected)

    def test_a_reload_of_a_bad_file_changes_nothing(self) -> None:
        """The agencies that were read before stay, and the log says why."""
        self.path.write_text("a = 1")
        agencies = Agencies(str(self.path))
        self.path.write_text("a = 2\na = 3")
        with capturedLogs() as events:
            agencies.reload()
        self.assertEqual(agencies.find("a"), 1)
        (line,) = texts(list(events), LogLevel.error)
        expected = f"action: reload | result: fail | error: --agencies {self.path}: line 2 names"
        self.assertIn(expected, line)
