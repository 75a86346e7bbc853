"""Stages: the contract, the runner, results that are written once, and the runs that refer to them."""
