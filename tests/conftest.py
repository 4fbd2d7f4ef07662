"""Fixtures that every test may use."""

pytest_plugins = ["tests.s3", "tests.cached"]
