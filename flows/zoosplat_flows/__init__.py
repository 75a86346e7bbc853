"""Prefect flows, the zoosplat command and the report."""
