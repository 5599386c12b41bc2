"""A Twisted server that takes tables from coffee-shop agencies, batch by batch."""

__version__ = "0.1.0"
