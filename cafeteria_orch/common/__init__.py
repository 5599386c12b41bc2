"""What several rooms need and none owns: rate-limited logs, clocks, listening, the command line.

A module here knows nothing of orchestrators. It may import Twisted and this room, and no other.
"""
