"""What several rooms need and none owns: rate-limited logs, clocks, endpoints, options, PEM files.

A module here knows nothing of orchestrators. It may import Twisted and this room, and no other.
"""
