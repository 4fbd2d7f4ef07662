"""Objectives: one small file per method with collate, loss and metrics. Never a trainer of its own."""
