"""Compute the geometry of the charts of a report; the template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mbrl_text_env.benchmarks.statistics import Interval

_WIDTH, _HEIGHT = 640.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 14.0, 46.0
_LABELS, _ROW = 210.0, 30.0
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """The data of one line or mark of a chart: an interval of y for each x."""

    name: str
    xs: Sequence[float]
    intervals: Sequence[Interval]


@dataclass(frozen=True)
class Mark:
    """An estimate with its interval; `x`, `y`, `low` and `high` are pixels of the SVG."""

    series: int
    name: str
    figure: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Tick:
    """A label on an axis and its position in pixels."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart in pixels of an SVG of `width` and `height`.

    `bands` and `lines` are SVG points by series index, `rows` the labels of a chart of rows
    (`of_rows`), `zero` the position of the reference line at 0.
    """

    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    marks: Sequence[Mark]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick] = ()
    rows: Sequence[Tick] = ()
    bands: Mapping[int, str] = field(default_factory=dict)
    lines: Mapping[int, str] = field(default_factory=dict)
    zero: float | None = None
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    bottom: float = _HEIGHT - _BOTTOM


def of_curves(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    is_log: bool = False,
    reference: int | None = None,
) -> Chart:
    """Make a chart of lines with bands; a series of one point is a mark with an error bar.

    `reference` is the index of a one-point series whose interval spans the whole width.

    Example:
        >>> chart = of_curves("", "N", "reward", [Series("a", [1.0], [Interval(0.5, 0.4, 0.6)])])
        >>> [tick.text for tick in chart.y_ticks]
        ['0.4', '0.45', '0.5', '0.55', '0.6']
    """
    xs = [x for one in series for x in one.xs]
    ends = [end for one in series for i in one.intervals for end in (i.estimate, i.low, i.high)]
    x = _Axis(xs, _LEFT + 12, _WIDTH - _RIGHT - 12, is_log=is_log)
    y = _Axis(ends, _HEIGHT - _BOTTOM - 8, _TOP)
    marks = [
        Mark(k, one.name, f"{i:.3f}", x(at), y(i.estimate), y(i.low), y(i.high))
        for k, one in enumerate(series)
        for at, i in zip(one.xs, one.intervals, strict=True)
    ]
    bands, lines = {}, {}
    for k in range(len(series)):
        own = [mark for mark in marks if mark.series == k]
        across = [(mark.x, mark.low, mark.high) for mark in own]
        if len(own) > 1:
            lines[k] = _points((mark.x, mark.y) for mark in own)
        elif k == reference:
            across = [(end, own[0].low, own[0].high) for end in (_LEFT, _WIDTH - _RIGHT)]
        if len(across) > 1:
            there, back = [(x, high) for x, _, high in across], [(x, low) for x, low, _ in across]
            bands[k] = _points([*there, *reversed(back)])
    names = [one.name for one in series]
    x_ticks, y_ticks = list(x.ticks()), list(y.ticks())
    return Chart(title, x_label, y_label, names, marks, x_ticks, y_ticks, (), bands, lines)


def of_rows(title: str, x_label: str, rows: Mapping[str, Mapping[str, Interval]]) -> Chart:
    """Make a chart of rows, each with one or more intervals by series name."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    intervals = [i for row in rows.values() for i in row.values()]
    ends = [end for i in intervals for end in (i.estimate, i.low, i.high)]
    height = _TOP + _ROW * len(rows) + _BOTTOM
    x = _Axis([*ends, 0.0], _LABELS + 12, _WIDTH - _RIGHT - 12)
    marks, labels = [], []
    for place, (label, row) in enumerate(rows.items()):
        middle = _TOP + _ROW * (place + 0.5)
        labels.append(Tick(middle, label))
        for name, i in row.items():
            k = names.index(name)
            y = middle + 9.0 * (k - (len(names) - 1) / 2)
            shown = label if len(names) == 1 else f"{label}, {name}"
            marks.append(Mark(k, shown, f"{i:+.3f}", x(i.estimate), y, x(i.low), x(i.high)))
    return Chart(
        title,
        x_label,
        "",
        names if len(names) > 1 else [],
        marks,
        list(x.ticks()),
        rows=labels,
        zero=x(0.0),
        height=height,
        left=_LABELS,
        bottom=height - _BOTTOM,
    )


class _Axis:
    """Map values to pixels."""

    def __init__(
        self, values: Sequence[float], first: float, last: float, *, is_log: bool = False
    ) -> None:
        self.is_log = is_log and min(values) > 0
        low, high = self._scaled(min(values)), self._scaled(max(values))
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
            room = abs(high) / 2 or 1.0
            low, high = low - room, high + room
        self.low, self.high, self.first, self.last = low, high, first, last

    def __call__(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 2)

    def _scaled(self, value: float) -> float:
        return math.log2(value) if self.is_log else value

    def ticks(self) -> Iterator[Tick]:
        """Ticks at multiples of 1, 2 or 5 times a power of ten; at powers of two on a log axis."""
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
        if self.is_log:
            step = max(1.0, math.ceil(rough))
        slack = 1e-9 * step
        for count in range(
            math.ceil((self.low - slack) / step), math.floor((self.high + slack) / step) + 1
        ):
            value = 2.0 ** (count * step) if self.is_log else count * step
            yield Tick(self(value), f"{value:.6g}")


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
