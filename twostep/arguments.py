"""Arguments that several commands take alike."""

from __future__ import annotations

import argparse


def add_interval(parser: argparse.ArgumentParser, what: str, says: str) -> None:
    """--WHAT-interval LEAST GREATEST, levels sigma; everywhere by default."""
    parser.add_argument(
        f"--{what}-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LEAST", "GREATEST"),
        help=f"{says} (default: 0 1, all)",
    )
