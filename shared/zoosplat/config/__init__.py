"""The configuration of an experiment: its sections, how it is read, checked and written."""
