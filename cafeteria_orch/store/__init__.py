"""The sink and its database: a batch that was acknowledged is on disk, once.

``sink`` queues and answers, in the reactor's thread. ``writer`` is the one thread that writes, in
groups; it calls a ``database``, plain blocking code. Only ``location`` knows which one that is.
Each database has its SQL: ``sqlite``, ``schema``, ``views`` and ``totals``; ``postgresql``.
``files`` knows who may use a store's file; ``outage`` tells operators what the store refuses. A
module here may import ``wire``, ``common`` and ``server``.
"""
