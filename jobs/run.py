"""The entry point of `ray job submit`: python jobs/run.py JOB [group.key=value …] ends with the exit code of the run."""

import sys

from rayft.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
