"""Reads what a stage's process prints: its progress as JSON lines, and the reason where it ends with bad input."""

from __future__ import annotations

import json

from zoosplat.errors import UserError

BAD_INPUT_STATUS = 2  # exit status of a stage whose input or configuration is wrong, see `zoosplat.stages.command`
PROGRESS_LOG_S = 10.0  # seconds between lines of progress in a stage's log: stages print several a second


def parse_progress(line: str) -> tuple[int, int, str] | None:
    """Frames or steps done, their total and a message of a line of progress; None for any other line."""
    try:
        event = json.loads(line)
        if event["event"] == "progress":
            return int(event["done"]), int(event["total"]), str(event["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return None


def bad_input_error(stage: str, lines: list[str]) -> UserError:
    """The error of a stage that ended with `BAD_INPUT_STATUS`, from the last lines that it printed (at least one)."""
    # The message may have several lines. Its first one is the last that begins with the stage's name.
    starts = [i for i, line in enumerate(lines) if line.startswith(f"zoosplat {stage}: ")]
    return UserError("\n".join(lines[starts[-1] if starts else -1 :]).removeprefix("zoosplat "))
