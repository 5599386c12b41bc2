# cython: language_level=3, boundscheck=True, wraparound=False
"""The row codec of :mod:`cafeteria_orch.wire.rows`, compiled.

It knows what is right, and only that: whatever it cannot decode or encode it hands to the pure
codec, which is the specification and names what is wrong. So both give the same errors.

The bytes come from the network. Every one of them is read through :func:`take`, which never
moves past the end.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint32_t
from libc.string cimport memcmp, memcpy

from functools import lru_cache

from . import rows as pure


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    void PyObject_GC_UnTrack(void *row)
    # Not Cython's own, which takes it that the cell is not empty.
    PyObject *PyTuple_GET_ITEM(object row, Py_ssize_t column)


cdef enum:
    LENGTH = 4
    MOST_KEYS = 64
    MOST_TABLES = 64
    # A longer row is left to the pure codec: no sum of sizes overflows, on 32 bits either.
    MOST_BYTES = 1 << 30


cdef struct Key:
    const char *text
    Py_ssize_t size
    Py_ssize_t column


cdef class Keys:
    """The keys of a table, as what they are compared with; and the names of its columns."""

    cdef Key keys[MOST_KEYS]
    cdef Key names[MOST_KEYS]
    cdef bint is_optional[MOST_KEYS]
    cdef int amount
    cdef Py_ssize_t width
    # Whether there is room for them. A table that has more is left to the pure codec.
    cdef bint fit
    # What the pointers point into.
    cdef object texts

    def __cinit__(self, table):
        cdef int number
        names = [column.encode() for column in table.columns]
        self.texts = [*table.index_of_key, *names]
        self.amount = len(table.index_of_key)
        self.width = len(names)
        self.fit = max(self.amount, self.width) <= MOST_KEYS
        if not self.fit:
            return
        for number, text in enumerate(table.index_of_key):
            self.keys[number] = key_of(text, table.index_of_key[text])
        for number, text in enumerate(names):
            self.names[number] = key_of(text, number)
            self.is_optional[number] = table.columns[number] in table.optional

    cdef inline int find(self, const char *text, Py_ssize_t size, int guess) noexcept:
        """The number of a key, which may be the guess; -1 if no key fits."""
        cdef int number = guess
        cdef int tried
        for tried in range(self.amount):
            if number >= self.amount:
                number = 0
            if self.keys[number].size == size and not memcmp(self.keys[number].text, text, size):
                return number
            number += 1
        return -1


cdef Key key_of(bytes text, Py_ssize_t column):
    return Key(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), column)


# Tables live for ever as a rule; those of a program that makes one for each batch do not.
keys_of = lru_cache(maxsize=MOST_TABLES)(Keys)


cdef struct Cursor:
    const char *at
    Py_ssize_t left


cdef inline const char *take(Cursor *cursor, Py_ssize_t size) noexcept:
    """The next bytes, and move past them; ``NULL`` if there are fewer."""
    cdef const char *start = cursor.at
    if size > cursor.left:
        return NULL
    cursor.at += size
    cursor.left -= size
    return start


cdef inline Py_ssize_t take_length(Cursor *cursor) noexcept:
    """The next length; -1 if it is cut off. What the wire says below 0 is one no body has."""
    cdef const unsigned char *at = <const unsigned char *> take(cursor, LENGTH)
    if at == NULL:
        return -1
    return at[0] | at[1] << 8 | at[2] << 16 | (<uint32_t> at[3]) << 24


def decode_rows(body, offset, count, table):
    """As :func:`cafeteria_orch.wire.rows.decode_rows`."""
    rows = None
    # A subclass of bytes or int may be anything: only what is known to be plain is read here.
    if type(body) is bytes and type(offset) is int and type(count) is int:
        if 0 <= offset <= len(body) and 0 <= count <= len(body):
            rows = decode_plain(<bytes> body, offset, count, keys_of(table))
    # What was decoded so far is freed before the pure codec decodes it again.
    return pure.decode_rows(body, offset, count, table) if rows is None else rows


cdef list decode_plain(bytes body, Py_ssize_t offset, Py_ssize_t count, Keys keys):
    """The rows, or ``None`` if they are malformed; the offset is one in the body."""
    cdef Cursor cursor
    cdef list rows = []
    cdef tuple row
    if not keys.fit:
        return None
    cursor.at = PyBytes_AS_STRING(body) + offset
    cursor.left = PyBytes_GET_SIZE(body) - offset
    for _ in range(count):
        row = decode_row(&cursor, keys)
        if row is None:
            return None
        rows.append(row)
    return None if cursor.left else rows


cdef tuple decode_row(Cursor *cursor, Keys keys):
    """One row, or ``None`` if it is malformed."""
    cdef tuple row = new_row(keys.width)
    cdef Py_ssize_t pairs = take_length(cursor)
    cdef Py_ssize_t pair, size, column
    cdef const char *text
    cdef int key = -1
    if not 0 <= pairs <= keys.width:
        return None
    for pair in range(pairs):
        size = take_length(cursor)
        if size < 0:
            return None
        text = take(cursor, size)
        if text == NULL:
            return None
        # Many a client sends the keys in the same order in every row.
        key = keys.find(text, size, key + 1)
        if key < 0:
            return None
        column = keys.keys[key].column
        size = take_length(cursor)
        if size < 0 or PyTuple_GET_ITEM(row, column) != NULL:
            return None
        text = take(cursor, size)
        if text == NULL:
            return None
        try:
            put(row, column, PyUnicode_DecodeUTF8(text, size, NULL))
        except UnicodeDecodeError:
            return None
    if pairs < keys.width:
        for column in range(keys.width):
            if PyTuple_GET_ITEM(row, column) == NULL:
                if not keys.is_optional[column]:
                    return None
                put(row, column, None)
    return row


cdef inline tuple new_row(Py_ssize_t width):
    """A row whose cells are empty, which no other code ever sees."""
    cdef tuple row = PyTuple_New(width)
    # So that what the collector runs meanwhile cannot get at it. And it will hold strings alone:
    # the collector would find that out by itself in each of its runs.
    PyObject_GC_UnTrack(<void *> row)
    return row


cdef inline void put(tuple row, Py_ssize_t column, object cell) noexcept:
    """Fill a cell that is still empty."""
    Py_INCREF(cell)
    PyTuple_SET_ITEM(row, column, cell)


def encode_row(row, table):
    """As :func:`cafeteria_orch.wire.rows.encode_row`."""
    encoded = encode_plain(row, keys_of(table))
    return pure.encode_row(row, table) if encoded is None else encoded


def encode_rows(rows, table):
    """As :func:`cafeteria_orch.wire.rows.encode_rows`."""
    return b"".join([encode_row(row, table) for row in rows])


cdef bytes encode_plain(row, Keys keys):
    """The bytes of a row, or ``None`` if it is not a tuple of what the columns take."""
    cdef Py_ssize_t column, size, pairs = 0, total = LENGTH
    cdef const char *text
    cdef char *at
    cdef bytes encoded
    if not keys.fit or type(row) is not tuple or len(row) != keys.width:
        return None
    for column in range(keys.width):
        cell = (<tuple> row)[column]
        if cell is None and keys.is_optional[column]:
            continue
        if type(cell) is not str:
            return None
        try:
            PyUnicode_AsUTF8AndSize(cell, &size)
        except UnicodeEncodeError:
            return None
        pairs += 1
        total += LENGTH + keys.names[column].size + LENGTH
        if size > MOST_BYTES - total:
            return None
        total += size
    encoded = PyBytes_FromStringAndSize(NULL, total)
    at = put_length(PyBytes_AS_STRING(encoded), pairs)
    for column in range(keys.width):
        cell = (<tuple> row)[column]
        if cell is not None:
            text = PyUnicode_AsUTF8AndSize(cell, &size)
            at = put_string(at, keys.names[column].text, keys.names[column].size)
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
