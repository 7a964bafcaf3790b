"""Command-line tools around the library; not part of the wheel."""
