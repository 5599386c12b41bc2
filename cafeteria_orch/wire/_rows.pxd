"""How compiled code walks the rows of a body: what other modules use of :mod:`._rows`.

The bytes come from the network. Every one of them is read through :func:`take`, which never
moves past the end.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp


cdef enum:
    LENGTH = 4
    MAX_KEYS = 64
    SLOTS = 64


cdef struct Key:
    const char *text
    Py_ssize_t size
    Py_ssize_t column


cdef struct Columns:
    # The keys of a table, as what they are compared with, and the names of its columns. A column
    # is one bit in the masks.
    Key keys[MAX_KEYS]
    Key names[MAX_KEYS]
    # By slot, the number of a key that is there; where none is, any.
    unsigned char guesses[SLOTS]
    unsigned int factor
    int amount
    Py_ssize_t width
    uint64_t all
    uint64_t optional


cdef class TableColumns:
    cdef Columns columns
    # Whether there is room for them. A table that has more is left to the pure codec.
    cdef readonly bint fit
    # What the pointers point into.
    cdef object _texts


cdef struct Cell:
    # NULL for a column that the row leaves out.
    const char *text
    Py_ssize_t size


cdef struct Cursor:
    const char *at
    Py_ssize_t left


cdef inline const char *take(Cursor *cursor, Py_ssize_t size) noexcept nogil:
    """The next bytes, and move past them; ``NULL`` if there are fewer."""
    cdef const char *start = cursor.at
    if size > cursor.left:
        return NULL
    cursor.at += size
    cursor.left -= size
    return start


cdef inline Py_ssize_t take_length(Cursor *cursor) noexcept nogil:
    """The next length; -1 if it is cut off. What the wire says below 0 is one no body has."""
    cdef const unsigned char *at = <const unsigned char *> take(cursor, LENGTH)
    if at == NULL:
        return -1
    return at[0] | at[1] << 8 | at[2] << 16 | (<uint32_t> at[3]) << 24


cdef inline bint take_string(Cursor *cursor, Cell *string) noexcept nogil:
    """The next length and as many bytes; ``False`` if they are cut off."""
    string.size = take_length(cursor)
    if string.size < 0:
        return False
    string.text = take(cursor, string.size)
    return string.text != NULL


cdef inline unsigned int slot_of(
    const char *text, Py_ssize_t size, unsigned int factor
) noexcept nogil:
    """Where the guess for a key stands: its size and its first byte tell most keys apart."""
    cdef unsigned int first = <unsigned char> text[0] if size else 0
    return (<unsigned int> size * factor + first) % SLOTS


cdef inline int find(const Columns *columns, const Cell *text) noexcept nogil:
    """The number of a key; -1 if no key fits."""
    cdef int number = columns.guesses[slot_of(text.text, text.size, columns.factor)]
    cdef int tried
    cdef const Key *key
    for tried in range(columns.amount):
        key = &columns.keys[number]
        if key.size == text.size and not memcmp(key.text, text.text, <size_t> text.size):
            return number
        number += 1
        if number == columns.amount:
            number = 0
    return -1


cdef inline bint take_row(Cursor *cursor, const Columns *columns, Cell *cells) noexcept nogil:
    """The cells of the next row, one a column; ``False`` if it is malformed.

    Whether the cells are UTF-8 is not looked at.
    """
    cdef Py_ssize_t pairs = take_length(cursor)
    cdef Py_ssize_t pair, column
    cdef Cell text
    cdef uint64_t bit, missing = columns.all
    cdef int key
    if not 0 <= pairs <= columns.width:
        return False
    for pair in range(pairs):
        if not take_string(cursor, &text):
            return False
        key = find(columns, &text)
        if key < 0:
            return False
        column = columns.keys[key].column
        bit = <uint64_t> 1 << column
        if not missing & bit:
            return False
        missing &= ~bit
        if not take_string(cursor, &cells[column]):
            return False
    if missing:
        if missing & ~columns.optional:
            return False
        for column in range(columns.width):
            if missing & <uint64_t> 1 << column:
                cells[column].text = NULL
    return True
