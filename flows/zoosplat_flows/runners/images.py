"""Names and the user of the stages' container images, which deploy/images/build.sh builds."""

from __future__ import annotations

IMAGE_USER_ID = 10001  # user and group that the images' processes run as


def image_name(registry: str, stage: str, tag: str) -> str:
    """The image of a stage, such as `localhost/zoosplat-center-rotation:dev`."""
    return f"{registry}/zoosplat-{stage.replace('_', '-')}:{tag}"
