"""Runners: each starts a stage in another place, as a process, a container or a Kubernetes Job."""
