"""Hyper-parameter search: Ray Tune over any job."""
