"""Messages that several entry points print; without imports, so that the first step of the command stays quick."""

from __future__ import annotations

STOPPED = "zoosplat: stopped; finished work is kept, the same command goes on from here"
