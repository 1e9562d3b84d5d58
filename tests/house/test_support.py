"""docs/support.md says what works where. Each column that this CPU can run is tried again, in a process of its own."""

from pathlib import Path

import pytest
import support

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


@pytest.mark.parametrize("title", support.columns())
def test_the_page_says_what_happens(title):
    pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    results = support.found(title)
    if results is None:
        pytest.skip(support.why_not(title))
    wrong = [
        f"{which}, {feature}, {dtype}: {why}"
        for which, features in results.items()
        for feature, types in features.items()
        for dtype, why in types.items()
        if why.startswith("WRONG")
    ]
    assert not wrong, "\n".join(wrong)
    page = PAGE.read_text()
    assert support.read(page)[title] == support.cells(results), "make support writes the page anew"
    for which in support.PASSES:
        given = support.reasons_of(page).get(f"{which} {support.columns()[title][0]}", [])
        assert given == support.reasons(results, which)


def test_a_wrong_result_is_seen(monkeypatch):
    """The page cannot say yes to whatever comes."""
    import tilefold.bench.case as case

    monkeypatch.setattr(case, "attention", lambda *a, **o: (a[0] * 2, a[0][..., 0]))
    assert support.attempt("forward", "float32 h2 q4 k4 d16", "auto").startswith("WRONG")
