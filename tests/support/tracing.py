"""Tests that are not traced for their coverage."""

from __future__ import annotations

import pytest

untraced = pytest.mark.no_cover
"""Marks a test that runs the same lines thousands of times: tracing makes it take three times as
long. What it runs is covered by other tests, or it does not count as covered."""
