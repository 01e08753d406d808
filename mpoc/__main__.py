"""``python -m mpoc`` is the ``mpoc`` command."""

from __future__ import annotations

from mpoc.cli.app import main

if __name__ == "__main__":
    main()
