"""One connection, and the factory of all: from the bytes that come to the answer that leaves.

Here are the connection and its state, when it is read, the memory budget, responses, the registry
of processors, the counters and the limits. A module here may import ``wire`` and ``common``.
"""
