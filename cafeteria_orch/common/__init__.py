"""What several rooms need and none of them owns: rate-limited logging, values on a command line.

A module here knows nothing of orchestrators. It may import Twisted and this room, and no other.
"""
