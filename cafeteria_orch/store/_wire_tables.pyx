# cython: language_level=3
"""Table-valued functions for SQLite: the rows of bodies, without a Python object for a cell.

``SELECT * FROM wire_users(?1, ?2)`` has the columns ``batch_id, user_id, gender, ...``. ``?1`` is a
blob of pairs of native 64-bit integers, the id of a batch and the size of its body; ``?2`` is a
blob of those bodies, one behind the other. There is a function for each of the five tables.

SQLite calls what is here without the interpreter lock: nothing here touches a Python object after
the import. The bytes come from the network, and are walked as :mod:`cafeteria_orch.wire._rows`
says.
"""

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from cafeteria_orch.wire._rows cimport (
    Cell,
    Columns,
    Cursor,
    LENGTH,
    MAX_KEYS,
    TableColumns,
    take,
    take_length,
    take_row,
)

from cafeteria_orch.wire._rows import columns_of
from cafeteria_orch.wire.messages import BATCH_HEADER
from cafeteria_orch.wire.tables import TABLES


cdef extern from *:
    """
    #include <sqlite3ext.h>
    SQLITE_EXTENSION_INIT1
    #define use_api(api) SQLITE_EXTENSION_INIT2(api)
    """
    ctypedef struct sqlite3:
        pass
    ctypedef struct sqlite3_api_routines:
        pass
    ctypedef struct sqlite3_context:
        pass
    ctypedef struct sqlite3_value:
        pass
    ctypedef long long sqlite3_int64
    ctypedef struct sqlite3_vtab:
        char *zErrMsg
    ctypedef struct sqlite3_vtab_cursor:
        sqlite3_vtab *pVtab
    struct sqlite3_index_constraint:
        int iColumn
        unsigned char op
        unsigned char usable
    struct sqlite3_index_constraint_usage:
        int argvIndex
        unsigned char omit
    ctypedef struct sqlite3_index_info:
        int nConstraint
        sqlite3_index_constraint *aConstraint
        sqlite3_index_constraint_usage *aConstraintUsage
        int idxNum
        double estimatedCost
    ctypedef struct sqlite3_module:
        int (*xConnect)(
            sqlite3 *, void *, int, const char *const *, sqlite3_vtab **, char **
        ) noexcept nogil
        int (*xBestIndex)(sqlite3_vtab *, sqlite3_index_info *) noexcept nogil
        int (*xDisconnect)(sqlite3_vtab *) noexcept nogil
        int (*xOpen)(sqlite3_vtab *, sqlite3_vtab_cursor **) noexcept nogil
        int (*xClose)(sqlite3_vtab_cursor *) noexcept nogil
        int (*xFilter)(
            sqlite3_vtab_cursor *, int, const char *, int, sqlite3_value **
        ) noexcept nogil
        int (*xNext)(sqlite3_vtab_cursor *) noexcept nogil
        int (*xEof)(sqlite3_vtab_cursor *) noexcept nogil
        int (*xColumn)(sqlite3_vtab_cursor *, sqlite3_context *, int) noexcept nogil
        int (*xRowid)(sqlite3_vtab_cursor *, sqlite3_int64 *) noexcept nogil
    int SQLITE_OK, SQLITE_ERROR, SQLITE_NOMEM, SQLITE_CONSTRAINT, SQLITE_INDEX_CONSTRAINT_EQ
    void (*SQLITE_TRANSIENT)(void *) noexcept nogil
    void use_api(const sqlite3_api_routines *) noexcept nogil
    int sqlite3_create_module(
        sqlite3 *, const char *, const sqlite3_module *, void *
    ) noexcept nogil
    int sqlite3_declare_vtab(sqlite3 *, const char *) noexcept nogil
    char *sqlite3_mprintf(const char *, ...) noexcept nogil
    const void *sqlite3_value_blob(sqlite3_value *) noexcept nogil
    int sqlite3_value_bytes(sqlite3_value *) noexcept nogil
    void sqlite3_result_int64(sqlite3_context *, sqlite3_int64) noexcept nogil
    void sqlite3_result_text(
        sqlite3_context *, const char *, int, void (*)(void *) noexcept nogil
    ) noexcept nogil


cdef enum:
    MAX_TABLES = 16
    # The columns before those of the table.
    FIRST_COLUMN = 1
    ARGUMENTS = 2


cdef struct Function:
    const char *name
    const char *declaration
    const Columns *columns


cdef struct WireTable:
    sqlite3_vtab base
    const Columns *columns


cdef struct WireCursor:
    sqlite3_vtab_cursor base
    const Columns *columns
    # Copies of the arguments: SQLite does not promise to keep them as long as the cursor.
    char *batches
    char *bodies
    # What is left of the arguments, and of the body that is being walked.
    Cursor sizes
    Cursor rest
    Cursor body
    int64_t batch_id
    Py_ssize_t rows_left
    bint is_over
    sqlite3_int64 row_number
    Cell cells[MAX_KEYS]


cdef int connect(
    sqlite3 *database,
    void *function,
    int argc,
    const char *const *argv,
    sqlite3_vtab **table,
    char **error,
) noexcept nogil:
    cdef WireTable *made
    cdef int result = sqlite3_declare_vtab(database, (<Function *> function).declaration)
    if result != SQLITE_OK:
        return result
    made = <WireTable *> calloc(1, sizeof(WireTable))
    if made == NULL:
        return SQLITE_NOMEM
    made.columns = (<Function *> function).columns
    table[0] = &made.base
    return SQLITE_OK


cdef int disconnect(sqlite3_vtab *table) noexcept nogil:
    free(table)
    return SQLITE_OK


cdef int plan(sqlite3_vtab *table, sqlite3_index_info *info) noexcept nogil:
    """Ask for the arguments, which are hidden columns behind all others."""
    cdef int first = FIRST_COLUMN + <int> (<WireTable *> table).columns.width
    cdef int number, argument, found = 0
    for number in range(info.nConstraint):
        argument = info.aConstraint[number].iColumn - first
        if argument < 0 or info.aConstraint[number].op != SQLITE_INDEX_CONSTRAINT_EQ:
            continue
        if not info.aConstraint[number].usable:
            return SQLITE_CONSTRAINT
        info.aConstraintUsage[number].argvIndex = argument + 1
        info.aConstraintUsage[number].omit = True
        found |= 1 << argument
    if found != (1 << ARGUMENTS) - 1:
        return fail(table, b"it takes the batches and their bodies")
    info.estimatedCost = 1
    return SQLITE_OK


cdef int fail(sqlite3_vtab *table, const char *why) noexcept nogil:
    table.zErrMsg = sqlite3_mprintf(b"%s", why)
    return SQLITE_ERROR


cdef int open_cursor(sqlite3_vtab *table, sqlite3_vtab_cursor **cursor) noexcept nogil:
    cdef WireCursor *made = <WireCursor *> calloc(1, sizeof(WireCursor))
    if made == NULL:
        return SQLITE_NOMEM
    made.columns = (<WireTable *> table).columns
    cursor[0] = &made.base
    return SQLITE_OK


cdef int close_cursor(sqlite3_vtab_cursor *base) noexcept nogil:
    cdef WireCursor *cursor = <WireCursor *> base
    free(cursor.batches)
    free(cursor.bodies)
    free(cursor)
    return SQLITE_OK


cdef int start(
    sqlite3_vtab_cursor *base, int plan, const char *name, int argc, sqlite3_value **argv
) noexcept nogil:
    cdef WireCursor *cursor = <WireCursor *> base
    if not (
        copy(argv[0], &cursor.batches, &cursor.sizes) and copy(argv[1], &cursor.bodies, &cursor.rest)
    ):
        return SQLITE_NOMEM
    cursor.body.left = cursor.rows_left = cursor.row_number = 0
    return go_on(base)


cdef bint copy(sqlite3_value *argument, char **bytes, Cursor *cursor) noexcept nogil:
    """Copy an argument in place of the one before; ``False`` if there is no memory for it."""
    cdef const void *source = sqlite3_value_blob(argument)
    free(bytes[0])
    cursor.left = sqlite3_value_bytes(argument)
    # No byte more: a sanitizer notices who reads past the end.
    cursor.at = bytes[0] = <char *> malloc(cursor.left)
    if bytes[0] == NULL:
        return not cursor.left
    memcpy(bytes[0], source, cursor.left)
    return True


cdef int go_on(sqlite3_vtab_cursor *base) noexcept nogil:
    """Move to the next row, of this body or of one that follows."""
    cdef WireCursor *cursor = <WireCursor *> base
    while not cursor.rows_left and not cursor.body.left and cursor.sizes.left:
        if not next_body(cursor):
            return fail(base.pVtab, b"a malformed batch")
    cursor.is_over = not (cursor.rows_left or cursor.body.left or cursor.rest.left)
    if cursor.is_over:
        return SQLITE_OK
    if not cursor.rows_left or not take_row(&cursor.body, cursor.columns, cursor.cells):
        return fail(base.pVtab, b"a malformed row")
    cursor.rows_left -= 1
    cursor.row_number += 1
    return SQLITE_OK


cdef bint next_body(WireCursor *cursor) noexcept nogil:
    """Begin with the next batch; ``False`` if its body or its header is cut off."""
    cdef int64_t batch[2]
    cdef const char *source = take(&cursor.sizes, sizeof(batch))
    if source == NULL:
        return False
    memcpy(batch, source, sizeof(batch))
    if batch[1] < 0:
        return False
    cursor.batch_id = batch[0]
    cursor.body.left = batch[1]
    cursor.body.at = take(&cursor.rest, batch[1])
    if cursor.body.at == NULL:
        return False
    cursor.rows_left = take_length(&cursor.body)
    return cursor.rows_left >= 0 and take(&cursor.body, header_rest) != NULL


cdef int is_over(sqlite3_vtab_cursor *cursor) noexcept nogil:
    return (<WireCursor *> cursor).is_over


cdef int column(
    sqlite3_vtab_cursor *base, sqlite3_context *context, int number
) noexcept nogil:
    cdef WireCursor *cursor = <WireCursor *> base
    cdef const Cell *cell = &cursor.cells[number - FIRST_COLUMN]
    if number < FIRST_COLUMN:
        sqlite3_result_int64(context, cursor.batch_id)
    elif number - FIRST_COLUMN < cursor.columns.width and cell.text != NULL:
        sqlite3_result_text(context, cell.text, <int> cell.size, SQLITE_TRANSIENT)
    return SQLITE_OK


cdef int row_number(sqlite3_vtab_cursor *cursor, sqlite3_int64 *number) noexcept nogil:
    number[0] = (<WireCursor *> cursor).row_number
    return SQLITE_OK


cdef int register(
    sqlite3 *database, char **error, const sqlite3_api_routines *api
) noexcept nogil:
    """Give a connection the functions. Where SQLite has no table of its API, there are none."""
    cdef int number, result = SQLITE_OK
    if api == NULL:
        return SQLITE_OK
    use_api(api)
    for number in range(amount):
        result = sqlite3_create_module(
            database, functions[number].name, &module, &functions[number]
        )
        if result != SQLITE_OK:
            break
    return result


cdef sqlite3_module module
module.xConnect = connect
module.xBestIndex = plan
module.xDisconnect = disconnect
module.xOpen = open_cursor
module.xClose = close_cursor
module.xFilter = start
module.xNext = go_on
module.xEof = is_over
module.xColumn = column
module.xRowid = row_number

cdef Function functions[MAX_TABLES]
cdef int amount = 0
cdef Py_ssize_t header_rest = BATCH_HEADER.size - LENGTH

# What the pointers of the functions point into.
_kept = []


cdef void add_function(table):
    global amount
    cdef TableColumns columns = columns_of(table)
    cdef bytes name = f"wire_{table.name}".encode()
    names = ", ".join(["batch_id", *table.columns, "batches HIDDEN", "bodies HIDDEN"])
    cdef bytes declaration = f"CREATE TABLE wire ({names})".encode()
    _kept.append((columns, name, declaration))
    functions[amount] = Function(name, declaration, &columns.columns)
    amount += 1


for table in TABLES:
    add_function(table)

ENTRY_POINT = <uintptr_t> &register
"""The address of what ``sqlite3_auto_extension`` takes."""
