from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lepton_fed.core.layout import Layout, vector_digest

SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
RULES = st.sampled_from(["shared", "local", "frozen"])


@st.composite
def models(draw: st.DrawFn) -> list[tuple[str, Any, np.ndarray[Any, Any]]]:
    """Tensors of a model: shared ones are float32 of any bits, others of any type."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), max_size=6, unique=True))
    entries = []
    for name in names:
        rule = draw(RULES)
        dtype = "float32" if rule == "shared" else draw(st.sampled_from(["int64", "float16"]))
        entries.append((name, rule, draw(npst.arrays(dtype, draw(SHAPES)))))
    return entries


@given(models())
def test_gather_and_views_are_each_others_inverse_to_the_bit(entries: Any) -> None:
    layout = Layout.of(entries)
    tensors = {name: value for name, _, value in entries}
    vector = layout.gather(tensors)
    views = layout.views(vector)
    assert list(views) == [name for name, rule, _ in entries if rule == "shared"]
    for name, view in views.items():
        assert view.shape == tensors[name].shape
        assert view.tobytes() == tensors[name].tobytes()
        assert view.size == 0 or np.shares_memory(view, vector)
    assert layout.gather(views).tobytes() == vector.tobytes()


@given(models())
def test_shared_tensors_tile_the_vector_without_gap_or_overlap(entries: Any) -> None:
    layout = Layout.of(entries)
    end = 0
    for entry in layout.of_rule("shared"):
        assert entry.offset == end
        end += entry.size
    assert end == layout.size


@given(models(), st.data())
def test_one_changed_bit_changes_the_digest_of_a_model(entries: Any, data: st.DataObject) -> None:
    layout = Layout.of(entries)
    vector = layout.gather({name: value for name, _, value in entries})
    digest = vector_digest(layout, vector)
    if layout.size:
        bits = vector.view(np.uint32)
        bits[data.draw(st.integers(0, layout.size - 1))] ^= 1 << data.draw(st.integers(0, 31))
        assert vector_digest(layout, vector) != digest


@given(models())
def test_a_layout_is_a_function_of_its_tensors(entries: Any) -> None:
    one = Layout.of(entries)
    two = Layout.of([(name, rule, value.copy()) for name, rule, value in entries])
    assert one == two
    assert one.digest == two.digest
