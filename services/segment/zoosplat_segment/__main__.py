"""Stage segment: see README.md beside this package."""

from zoosplat.stages.service import run_service

if __name__ == "__main__":
    run_service("segment")
