"""The command `rdrop`, also `python -m rdrop`. Lives in the extra `experiments`, so what it needs may be missing."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from rdrop.experiments.launch.cli import run

        sys.exit(run(sys.argv[1:]))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in {"", "rdrop"}:
            raise
        sys.stderr.write(
            f"rdrop: the command needs {missing}, which is not installed; "
            "in a clone of the repository: pip install '.[experiments]'\n"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
