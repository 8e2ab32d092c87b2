import pytest

from slm_pl.report.figures import cell_text, figure_text, number_text, ratio_text
from slm_pl.report.rows import Cell


@pytest.mark.parametrize(
    ("value", "quantity", "text"),
    [
        (113e6, "macs", "113.00 M"),
        (6.61e9, "macs", "6.61 G"),
        (1.35e13, "macs", "13.50 T"),
        (4096, "macs", "4,096"),
        (23040, "size", "22.5 KiB"),
        (512, "size", "512 B"),
        (3 * 2**29, "size", "1.5 GiB"),
        (0.39, "joules", "390.0 mJ"),
        (2.5, "joules", "2.50 J"),
        (1.254, "promise", "1.25×"),
        (0.97, "share", "97.0 %"),
    ],
)
def test_numbers(value, quantity, text):
    assert number_text(value, quantity) == text


def test_ratios_of_work_are_shares():
    assert ratio_text(0.842, "macs") == ratio_text(0.842, "size") == "84.2 %"
    assert cell_text(Cell(113e6, ratio=0.842), "macs") == "113.00 M (84.2 %)"
    assert figure_text(Cell(1.19, low=1.17, high=1.21), "speedup") == "1.19× [1.17, 1.21]"
    assert figure_text(Cell(None, text="float32"), "text") == "float32"
