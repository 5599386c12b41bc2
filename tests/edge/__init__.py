"""Tests of the room ``edge``."""
