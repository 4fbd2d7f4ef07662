"""The command line. `parser` says what may stand there, `verbs` does it."""

from __future__ import annotations

import sys
import traceback

from rayft.cli.parser import parse
from rayft.errors import RayftError


def main(argv: list[str] | None = None) -> int:
    """Run a verb; an error becomes one sentence on stderr and its exit code."""
    args = parse(argv)
    try:
        return int(args.function(args))
    except RayftError as error:
        if args.debug:
            traceback.print_exc()
        print(f"rayft {args.verb}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"rayft {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(
            f"rayft {args.verb}: a bug in rayft: {type(error).__name__}: {error}. Run it again with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 1
