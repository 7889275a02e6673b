"""``python -m bae_fast``, for where the script is not on the path."""

from bae_fast.cli import main

raise SystemExit(main())
