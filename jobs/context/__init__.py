"""Answers from a passage, and a fixed sentence when the passage holds none: the data of `jobs/sft_context.yaml`."""
