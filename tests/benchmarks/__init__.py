"""What the server is measured against: ``python -m tests.benchmarks`` prints one table."""
