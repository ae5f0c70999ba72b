"""`python -m qbench`: compose a configuration (or a sweep of them), check it, run it. Also routes `qbench ls` etc.

Exit codes: 0 all done, 1 a point failed, 2 the request was refused (one line says why), 130 interrupted.
"""

from __future__ import annotations

import os
import sys

from qbench.errors import QbenchError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        from qbench import cli

        try:
            code = cli.main(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has seen enough; nothing is left to be written at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return code
    from qbench.command import run_command

    # Hydra prints its own multi-line reports unless told to let exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return run_command(arguments)
    except QbenchError as error:
        print(f"qbench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qbench: interrupted; finished points are stored, run the command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
