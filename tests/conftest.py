"""Fixtures that every test may use."""

import os

import hypothesis

# No test fails for what a busy machine takes.
hypothesis.settings.register_profile("rayft", deadline=None)
hypothesis.settings.load_profile("rayft")

# How often Ray Train looks whether a run has ended; runs of tests are short.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

pytest_plugins = ["tests.s3", "tests.cached"]
