"""Tests of the room ``sender``."""
