"""The process: its options, its service, its signals, its descriptors, systemd.

It starts and stops the rooms below it and knows nothing of messages. A module here may import all
rooms of the server, and the package's version; nothing but ``tap`` imports it.
"""
