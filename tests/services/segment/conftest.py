"""A few of the random animals that training scenes are composed of."""

from __future__ import annotations

import pytest

from zoosplat_segment.sprites import Sprites, render_sprites

TESTED = 1 << 20  # number of an animal that the network of the package was not trained on


@pytest.fixture(scope="session")
def sprites() -> Sprites:
    return render_sprites(TESTED, 2)
