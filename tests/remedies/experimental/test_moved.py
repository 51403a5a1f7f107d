"""The old place of each remedy still works, with a warning."""

from __future__ import annotations

import pytest

from nfi_monitor import remedies
from nfi_monitor.remedies import experimental


@pytest.mark.parametrize("name", experimental.__all__)
def test_a_remedy_that_moved_is_found_at_its_old_place_with_a_warning(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"experimental import {name}") as warned:
        found = getattr(remedies, name)
    assert found is getattr(experimental, name)
    assert warned[0].filename == __file__, "it is the caller who has to change something"
    assert name not in remedies.__all__
