# cython: language_level=3, boundscheck=True, wraparound=False
"""The row codec of :mod:`cafeteria_orch.wire.rows`, compiled.

It knows what is right, and only that: whatever it cannot decode or encode it hands to the pure
codec, which is the specification and names what is wrong. So both give the same errors.

How it walks a body stands in ``_rows.pxd``.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from functools import lru_cache

from . import rows as pure


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    void PyObject_GC_UnTrack(void *row)


cdef enum:
    MAX_TABLES = 64
    # A longer row is left to the pure codec: no sum of sizes overflows, on 32 bits either.
    MAX_BYTES = 1 << 30


cdef class TableColumns:
    """The keys of a table and the names of its columns, in the form that a body is walked with."""

    def __cinit__(self, table):
        cdef int number
        cdef Columns *columns = &self.columns
        names = [column.encode() for column in table.columns]
        self._texts = [*table.index_of_key, *names]
        columns.amount = len(table.index_of_key)
        columns.width = len(names)
        self.fit = max(columns.amount, columns.width) <= MAX_KEYS
        if not self.fit:
            return
        for number, text in enumerate(table.index_of_key):
            columns.keys[number] = key_of(text, table.index_of_key[text])
        for number, text in enumerate(names):
            columns.names[number] = key_of(text, number)
            columns.all |= <uint64_t> 1 << number
            if table.columns[number] in table.optional:
                columns.optional |= <uint64_t> 1 << number
        choose_guesses(columns)


cdef void choose_guesses(Columns *columns):
    cdef int number, factor, best = 0
    for factor in range(SLOTS):
        number = count_slots(columns, factor)
        if number > best:
            best, columns.factor = number, factor
    for number in range(columns.amount):
        columns.guesses[slot_of_key(&columns.keys[number], columns.factor)] = number


cdef int count_slots(const Columns *columns, unsigned int factor):
    """How many slots the keys share."""
    cdef uint64_t taken = 0
    cdef int number
    for number in range(columns.amount):
        taken |= <uint64_t> 1 << slot_of_key(&columns.keys[number], factor)
    return bin(taken).count("1")


cdef inline unsigned int slot_of_key(const Key *key, unsigned int factor) noexcept:
    return slot_of(key.text, key.size, factor)


cdef Key key_of(bytes text, Py_ssize_t column):
    return Key(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), column)


# Tables live for ever as a rule; those of a program that makes one for each batch do not.
columns_of = lru_cache(maxsize=MAX_TABLES)(TableColumns)


def check_rows(body, offset, count, table):
    """As :func:`cafeteria_orch.wire.rows.check_rows`; makes no rows."""
    if is_plain(body, offset, count):
        if are_rows(<bytes> body, offset, count, columns_of(table)):
            return None
    return pure.check_rows(body, offset, count, table)


cdef bint is_plain(body, offset, count):
    """Whether a body and two numbers are what they seem, and the numbers are within it.

    A subclass of bytes or int may be anything: only what is known to be plain is read here.
    """
    if type(body) is bytes and type(offset) is int and type(count) is int:
        return 0 <= offset <= len(body) and 0 <= count <= len(body)
    return False


cdef Cursor cursor_at(bytes body, Py_ssize_t offset):
    return Cursor(PyBytes_AS_STRING(body) + offset, PyBytes_GET_SIZE(body) - offset)


cdef bint are_rows(bytes body, Py_ssize_t offset, Py_ssize_t count, TableColumns table):
    """Whether the body holds so many rows, and nothing else, from the offset on."""
    cdef Cursor cursor = cursor_at(body, offset)
    cdef Columns *columns = &table.columns
    cdef Cell cells[MAX_KEYS]
    cdef Py_ssize_t row, column
    # As a rule one look at the whole body spares one at each cell.
    cdef bint is_utf8 = is_ascii(cursor.at, cursor.left)
    if not table.fit:
        return False
    for row in range(count):
        if not take_row(&cursor, columns, cells):
            return False
        if not is_utf8:
            for column in range(columns.width):
                if cells[column].text != NULL and not is_text(&cells[column]):
                    return False
    return not cursor.left


cdef bint is_ascii(const char *at, Py_ssize_t size) noexcept nogil:
    cdef char seen = 0
    cdef Py_ssize_t place
    for place in range(size):
        seen |= at[place]
    return not seen & 0x80


cdef bint is_text(const Cell *cell) noexcept nogil:
    """Whether a cell is UTF-8 as Python takes it: the shortest form, and no surrogates."""
    cdef const unsigned char *at = <const unsigned char *> cell.text
    cdef const unsigned char *end = at + cell.size
    cdef unsigned char lowest, highest
    cdef int size
    while at < end:
        # What the second byte may be says what is too short, a surrogate, or too large.
        lowest, highest = 0x80, 0xBF
        if at[0] < 0x80:
            at += 1
            continue
        elif 0xC2 <= at[0] <= 0xDF:
            size = 2
        elif 0xE0 <= at[0] <= 0xEF:
            size = 3
            if at[0] == 0xE0:
                lowest = 0xA0
            elif at[0] == 0xED:
                highest = 0x9F
        elif 0xF0 <= at[0] <= 0xF4:
            size = 4
            if at[0] == 0xF0:
                lowest = 0x90
            elif at[0] == 0xF4:
                highest = 0x8F
        else:
            return False
        if end - at < size or not lowest <= at[1] <= highest:
            return False
        if size > 2 and at[2] & 0xC0 != 0x80 or size > 3 and at[3] & 0xC0 != 0x80:
            return False
        at += size
    return True


def decode_rows(body, offset, count, table):
    """As :func:`cafeteria_orch.wire.rows.decode_rows`."""
    rows = None
    if is_plain(body, offset, count):
        rows = decode_plain(<bytes> body, offset, count, columns_of(table))
    # What was decoded so far is freed before the pure codec decodes it again.
    return pure.decode_rows(body, offset, count, table) if rows is None else rows


cdef list decode_plain(bytes body, Py_ssize_t offset, Py_ssize_t count, TableColumns table):
    """The rows, or ``None`` if they are malformed; the offset is one in the body."""
    cdef Cursor cursor = cursor_at(body, offset)
    cdef Cell cells[MAX_KEYS]
    cdef list rows = []
    if not table.fit:
        return None
    for _ in range(count):
        if not take_row(&cursor, &table.columns, cells):
            return None
        try:
            rows.append(row_of(cells, table.columns.width))
        except UnicodeDecodeError:
            return None
    return None if cursor.left else rows


cdef tuple row_of(const Cell *cells, Py_ssize_t width):
    cdef tuple row = PyTuple_New(width)
    cdef Py_ssize_t column
    # So that what the collector runs meanwhile cannot get at a row whose cells are empty. And it
    # will hold strings alone: the collector would find that out by itself in each of its runs.
    PyObject_GC_UnTrack(<void *> row)
    for column in range(width):
        if cells[column].text == NULL:
            cell = None
        else:
            cell = PyUnicode_DecodeUTF8(cells[column].text, cells[column].size, NULL)
        Py_INCREF(cell)
        PyTuple_SET_ITEM(row, column, cell)
    return row


def encode_row(row, table):
    """As :func:`cafeteria_orch.wire.rows.encode_row`."""
    encoded = encode_plain(row, columns_of(table))
    return pure.encode_row(row, table) if encoded is None else encoded


def encode_rows(rows, table):
    """As :func:`cafeteria_orch.wire.rows.encode_rows`."""
    return b"".join([encode_row(row, table) for row in rows])


cdef bytes encode_plain(row, TableColumns table):
    """The bytes of a row, or ``None`` if it is not a tuple of what the columns take."""
    cdef Py_ssize_t column, size, pairs = 0, total = LENGTH
    cdef const char *text
    cdef char *at
    cdef bytes encoded
    cdef Columns *columns = &table.columns
    if not table.fit or type(row) is not tuple or len(row) != columns.width:
        return None
    for column in range(columns.width):
        cell = (<tuple> row)[column]
        if cell is None and columns.optional >> column & 1:
            continue
        if type(cell) is not str:
            return None
        try:
            PyUnicode_AsUTF8AndSize(cell, &size)
        except UnicodeEncodeError:
            return None
        pairs += 1
        total += LENGTH + columns.names[column].size + LENGTH
        if size > MAX_BYTES - total:
            return None
        total += size
    encoded = PyBytes_FromStringAndSize(NULL, total)
    at = put_length(PyBytes_AS_STRING(encoded), pairs)
    for column in range(columns.width):
        cell = (<tuple> row)[column]
        if cell is not None:
            text = PyUnicode_AsUTF8AndSize(cell, &size)
            at = put_string(at, columns.names[column].text, columns.names[column].size)
            at = put_string(at, text, size)
    return encoded


cdef inline char *put_string(char *at, const char *text, Py_ssize_t size) noexcept:
    """Write a string; where the next one goes."""
    at = put_length(at, size)
    memcpy(at, text, size)
    return at + size


cdef inline char *put_length(char *at, Py_ssize_t length) noexcept:
    """Write a length; where what it measures goes."""
    at[0] = <char> (length & 0xFF)
    at[1] = <char> (length >> 8 & 0xFF)
    at[2] = <char> (length >> 16 & 0xFF)
    at[3] = <char> (length >> 24 & 0xFF)
    return at + LENGTH


def copy_text(body, offset, count, table, batch_id):
    """As :func:`cafeteria_orch.wire.rows.copy_text`."""
    text = None
    if is_plain(body, offset, count) and type(batch_id) is int:
        text = copy_plain(<bytes> body, offset, count, columns_of(table), b"%d\t" % batch_id)
    return pure.copy_text(body, offset, count, table, batch_id) if text is None else text


cdef bytes copy_plain(
    bytes body, Py_ssize_t offset, Py_ssize_t count, TableColumns table, bytes start
):
    """The text, or ``None`` if the rows are malformed or hold a NUL."""
    cdef Cursor cursor = cursor_at(body, offset)
    cdef Cell first = Cell(PyBytes_AS_STRING(start), PyBytes_GET_SIZE(start))
    # Beside the bytes of the cells, each of which may be escaped: a NULL's two, and what follows.
    cdef Py_ssize_t widest = first.size + 3 * table.columns.width + 1
    cdef char *begin
    cdef char *end
    if not table.fit or count > cursor.left // LENGTH:
        return None
    if cursor.left > MAX_BYTES // 4 or count > MAX_BYTES // 4 // widest:
        return None
    # As large as it can get: what is not written takes no memory.
    begin = <char *> malloc(<size_t> (2 * cursor.left + count * widest))
    if begin == NULL:
        raise MemoryError
    try:
        with nogil:
            end = put_lines(begin, &cursor, count, &table.columns, &first)
        return None if end == NULL else PyBytes_FromStringAndSize(begin, end - begin)
    finally:
        free(begin)


cdef char *put_lines(
    char *at, Cursor *cursor, Py_ssize_t count, const Columns *columns, const Cell *first
) noexcept nogil:
    """Write the rows of a body that has them and nothing else, and return where they end.

    ``NULL`` if it has not, or there is a NUL in a cell.
    """
    cdef Cell cells[MAX_KEYS]
    cdef Py_ssize_t row, column
    cdef bint is_utf8 = is_ascii(cursor.at, cursor.left)
    for row in range(count):
        if not take_row(cursor, columns, cells):
            return NULL
        memcpy(at, first.text, <size_t> first.size)
        at += first.size
        for column in range(columns.width):
            if column:
                at[0] = b"\t"
                at += 1
            if cells[column].text == NULL:
                at[0], at[1] = b"\\", b"N"
                at += 2
            elif is_utf8 or is_text(&cells[column]):
                at = put_escaped(at, &cells[column])
                if at == NULL:
                    return NULL
            else:
                return NULL
        at[0] = b"\n"
        at += 1
    return NULL if cursor.left else at


cdef inline char *put_escaped(char *at, const Cell *cell) noexcept nogil:
    """Write a cell, and return where it ends; ``NULL`` if there is a NUL in it."""
    cdef Py_ssize_t place
    cdef char byte
    for place in range(cell.size):
        byte = cell.text[place]
        if byte == b"\\" or 0 <= byte <= b"\r":
            if byte == 0:
                return NULL
            if byte == b"\t" or byte == b"\n" or byte == b"\r" or byte == b"\\":
                at[0] = b"\\"
                at += 1
                byte = (
                    b"t" if byte == b"\t" else b"n" if byte == b"\n"
                    else b"r" if byte == b"\r" else byte
                )
        at[0] = byte
        at += 1
    return at
