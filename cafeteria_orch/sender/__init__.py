"""The room sender."""
