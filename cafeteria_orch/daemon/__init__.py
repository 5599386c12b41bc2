"""The room daemon."""
