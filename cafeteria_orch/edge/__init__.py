"""The room edge."""
