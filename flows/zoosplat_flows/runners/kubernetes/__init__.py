"""The Kubernetes runner: stages as Jobs of a cluster."""
