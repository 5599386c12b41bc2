"""Coverage-guided fuzzing of what hostile bytes meet first.

A target feeds bytes to one part of the package and holds what must be true of any input. The
corpus of each is replayed by the suite; ``python -m tests.fuzzing`` looks for more.
"""
