"""What a model can do, measured before and after training: the suites of a job.

- `run.py`: runs suites over an engine, on one process or dealt over ranks.
- `suite.py`: what a suite type brings: rows, a measurement per row, a summary.
- `rows.py`: rows of a suite's file, and what an answer is asked from.
- one file per type: `bits_per_byte`, `multiple_choice`, `json_answers`, `qa`, `ifeval`.

A new type is one file with a class as in `suite.py`, its name in `rayft.spec.Suite` and in `run.TYPES`, and a test
against figures made by hand.
"""
