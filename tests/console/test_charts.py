"""Pictures as geometry: nothing reaches beyond its box, what is more is longer, and what is not known has no length."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from execution_envelope.console.charts import HEIGHT, WIDTH, bars, columns, positions, rough, stacked
from execution_envelope.resources import VOCABULARY, human

AMOUNTS = st.integers(0, 2**70) | st.sampled_from(["unknown", "unlimited", None])


@given(st.sampled_from(sorted(VOCABULARY)), st.lists(AMOUNTS, min_size=1, max_size=6))
def test_bars_are_in_proportion(resource: str, amounts: list[int | str | None]) -> None:
    made = bars(resource, {str(number): amount for number, amount in enumerate(amounts)})  # type: ignore[misc]
    assert [bar.words for bar in made] == [human(resource, amount) for amount in amounts]  # type: ignore[arg-type]
    for bar, amount in zip(made, amounts, strict=True):
        assert 0 <= bar.width <= WIDTH
        assert (bar.width > 0) == (amount == "unlimited" or (isinstance(amount, int) and amount > 0))
        assert bar.open_end == (amount == "unlimited")
    known = sorted((amount, bar.width) for bar, amount in zip(made, amounts, strict=True) if isinstance(amount, int))
    assert [width for _, width in known] == sorted(width for _, width in known)
    if known and known[-1][0]:
        assert known[-1][1] == WIDTH


@given(st.lists(st.integers(0, 10**18), min_size=1, max_size=4), st.integers(0, 10**18))
def test_parts_stand_one_behind_the_other(parts: list[int], whole: int) -> None:
    made = stacked({str(number): (amount, str(amount)) for number, amount in enumerate(parts)}, whole)
    end = 0.0
    for piece in made:
        assert abs(piece.x - end) < 0.02 and piece.width >= -0.01
        end = piece.x + piece.width
    assert end <= WIDTH + 0.02


@given(st.integers(1, 40), st.data())
def test_columns_stand_on_the_ground_within_their_group(count: int, data: st.DataObject) -> None:
    series = {name: data.draw(st.lists(st.integers(0, 10**15), min_size=count, max_size=count)) for name in "ab"}
    words = {name: [str(value) for value in values] for name, values in series.items()}
    chart = columns([str(number) for number in range(count)], series, words)
    assert len(chart.columns) == sum(value > 0 for values in series.values() for value in values)
    for column in chart.columns:
        assert abs(column.y + column.height - HEIGHT) < 0.02 and 0 <= column.x <= column.x + column.width <= chart.width
    assert chart.top == str(max(max(values) for values in series.values()))


@given(st.lists(st.integers(-(10**12), 10**15), max_size=50))
def test_moments_keep_their_order(offsets: list[int]) -> None:
    made = positions(sorted(offsets))
    assert made == sorted(made) and all(0 <= x <= WIDTH for x in made)


@given(st.sampled_from(sorted(VOCABULARY)), st.integers(0, 2**80))
def test_a_sum_in_words_is_short_and_right(resource: str, amount: int) -> None:
    text = rough(resource, amount)
    if not text.startswith("≈"):
        assert text == human(resource, amount)
        return
    size = {
        "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4, "PiB": 1024**5,
        "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000,
        "k": 10**3, "M": 10**6, "G": 10**9,
    }  # fmt: skip
    _, number, *unit = text.replace("/s", "").removesuffix(" units").split()
    base = {"milli": 1000, "micro": 1_000_000}.get(VOCABULARY[resource].unit, 1)
    factor = size[unit[0]] if unit else 1
    if (unit and unit[0] in ("k", "M", "G")) or not unit:
        factor *= base
    assert abs(float(number) * factor - amount) <= amount * 0.006 + factor * 0.006
