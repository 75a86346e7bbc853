"""Turns errors and Ctrl-C into what a user of the command line expects."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from zoosplat.errors import UserError

USER_ERROR_STATUS = 2  # exit status of a command that fails for what the user can mend


class CommandGroup(TyperGroup):
    """A group of commands whose user errors are a line on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"zoosplat: {error}", err=True)
            raise typer.Exit(USER_ERROR_STATUS) from None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Raise failures of the storage that the block meets as UserError, with a line that says what to do.

    Args:
        url: what the block reads or writes, for the message.
    """
    try:
        yield
    except (UserError, typer.Exit):
        raise
    except Exception as error:
        from zoosplat.storage.errors import as_user_error

        known = as_user_error(error, url)
        if known is None:
            raise
        raise known from error


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the block without a message, for commands that go on until the user ends them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
