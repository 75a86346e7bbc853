"""Execution of a run: its stages in their order, and the record that is kept of them."""
