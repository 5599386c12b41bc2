"""The sink and its databases: a batch that was acknowledged is on disk, once.

The sink queues, commits in groups and answers; a database is plain blocking code in the one writer
thread. A module here may import ``wire``, ``common`` and ``server``.
"""
