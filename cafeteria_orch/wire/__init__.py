"""What the bytes mean: opcodes, tables, messages, the row codec, framing, and their errors.

Pure: bytes in, values out, or the other way round. A module here does no I/O, and imports the
standard library and this room alone, no Twisted.
"""
