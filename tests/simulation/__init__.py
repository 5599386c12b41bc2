"""A simulated world: server and senders, unchanged, where everything goes wrong at once, by a seed.

``world`` has the clock and the order of all events; ``threads``, ``network``, ``reactor`` and ``disk``
are what a process stands on; ``server`` and ``clients`` are the processes; ``faults`` is what goes
wrong, ``checks`` what must hold all the same, ``planted`` the mistakes that must be found. A run is
repeated by its seed: ``python -m tests.simulation --seed N``.
"""
