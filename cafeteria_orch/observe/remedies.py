"""What an operator does when the server takes no batches."""

from __future__ import annotations

_STATES = {
    "starting": "Wait. If it stays so, the end of the log says what the server waits for.",
    "draining": (
        "Nothing has to be done: the server ends when the batches in progress are answered, at the"
        " latest after --drain-timeout."
    ),
}

_NO_ROOM = "Make room on the disk of the store. No restart is needed."

_REFUSALS = {
    "the store's writer has ended": (
        "Restart the server, and report the line of the log that says so."
    ),
    "waits for a synchronous standby": (
        "Start a standby again, or empty synchronous_standby_names to go on with what is"
        " acknowledged on one machine alone. Batches wait and are not lost."
    ),
    "has not answered for": (
        "Check the disk of the store, or its database's server: it hangs or is much too slow."
        " Batches wait for it, and get no answer until it has decided."
    ),
    "refuses some batches now": (
        "Somebody has changed a table, which the reason names: undo the change. The batches of the"
        " other tables are stored."
    ),
    "disk is full": _NO_ROOM,
    "No space left": _NO_ROOM,
    "locked": ("End the program that holds the lock on the store's file. No restart is needed."),
    "last commit is still in progress": (
        "Wait: the database's server is still at a commit, as while a standby is away. Start the"
        " standby again if it is."
    ),
}
"""By a part of the reason. The first one that is found counts."""

_OTHER = (
    "Check the disk of the store, or its database's server and the network between: the server"
    " tries again every second, and no restart is needed."
)


def remedy_for(state: str, reason: str | None) -> str | None:
    """What to do in a state, in one line.

    :param state: of the server.
    :param reason: why it takes no batches; ``None`` if it does.
    :return: ``None`` if there is nothing to be mended.
    """
    if reason is None:
        return None
    if state in _STATES:
        return _STATES[state]
    found = (remedy for part, remedy in _REFUSALS.items() if part in reason)
    return next(found, _OTHER)
