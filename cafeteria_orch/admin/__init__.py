"""Everything but the server itself: the command ``cafeorch``.

``cli`` has the command; each of its parts has a module, as ``copy_command``, or is a program of
its own too, as ``cafeorch-bench``. ``connections`` speaks to the databases, ``reading`` and
``writing`` know the tables of a store, ``copying`` and ``verification`` move them and compare
them. A module here may import ``wire``, ``common``, ``store``, ``sender`` and ``bench``; it
blocks, so no module of the server imports this room.
"""
