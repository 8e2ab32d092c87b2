import io

import matplotlib.image
import numpy
import pytest

from slm_pl.compression.plan import Base, DropLayers, MergeLayers, Method, Plan
from slm_pl.pictures import COLOURS, load_figures, search_trace, similarity_matrix

TRACE = (
    {"low": 4, "high": 5, "similarity": 0.2, "accepted": False, "search": 0},
    {"low": 4, "high": 5, "similarity": 0.9, "accepted": True, "search": 1},
    {"low": 3, "high": 5, "similarity": 0.7, "accepted": False, "search": 1},
)
PLAN = Plan(
    base=Base("some/model", None, "llama", 8, 1000, "ab"),
    method=Method("callbacks.SlidingWindowMerging", {"similarity": "cosine"}),
    calibration=None,
    steps=(MergeLayers(4, 5),),
    trace=TRACE,
    outcome={"threshold": 0.8, "search": 1, "searches": [{}, {}], "cut_to_fit": False},
)


def pixels(png: bytes) -> numpy.ndarray:
    return (matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(int)


def count(picture: numpy.ndarray, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(picture - wanted).max(axis=2) <= 1).sum())


def test_trace_shows_the_deciding_search_in_two_colours():
    from dataclasses import replace

    png = search_trace(PLAN)
    assert png is not None
    picture = pixels(png)
    accepted, rejected = count(picture, COLOURS[0]), count(picture, COLOURS[5])
    # Bars below: one accepted try of two layers, one rejected of three. The other search's try is not drawn.
    assert rejected / accepted == pytest.approx(1.5, rel=0.1)
    assert search_trace(PLAN) == png  # byte for byte: nothing in it varies from run to run
    everything = search_trace(replace(PLAN, outcome={"threshold": 0.8}, trace=tuple({**t, "search": 0} for t in TRACE)))
    assert everything is not None
    assert count(pixels(everything), COLOURS[5]) / count(pixels(everything), COLOURS[0]) > 2


def test_plan_without_windows_has_no_trace_picture():
    from dataclasses import replace

    assert search_trace(replace(PLAN, trace=(), steps=(DropLayers((3,)),))) is None
    assert search_trace(replace(PLAN, trace=({"layer": 3, "score": 1.0},), steps=(DropLayers((3,)),))) is None


def test_matrix_outlines_the_windows():
    matrix = [[1.0 if i == j else 0.5 for j in range(6)] for i in range(6)]
    labels = [str(i) for i in range(6)]
    plain = pixels(similarity_matrix(matrix, labels, [], "title"))
    one = pixels(similarity_matrix(matrix, labels, [(1, 3)], "title"))
    assert count(plain, COLOURS[5]) == 0
    changed = numpy.argwhere((plain != one).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    # Three of six layers: a square of half the map, which is about five inches at 150 dpi.
    assert (bottom - top) == pytest.approx(right - left, abs=3)
    outlined = pixels(similarity_matrix(matrix, labels, [(0, 5)], "title"))
    rows = numpy.argwhere((plain != outlined).any(axis=2))
    assert (rows.max(0) - rows.min(0))[0] / (bottom - top) == pytest.approx(2, rel=0.05)


def test_only_similarity_figures_are_carried_on(tmp_path):
    for name in ("representation_similarity.json", "representation_similarity.2.png", "search_trace.png", "x.json"):
        (tmp_path / name).write_bytes(name.encode())
    assert load_figures(tmp_path) == {
        name: name.encode() for name in ("representation_similarity.2.png", "representation_similarity.json")
    }
