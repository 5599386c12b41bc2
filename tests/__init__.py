"""The tests: ``python -m tests`` runs them, and all other checks."""
