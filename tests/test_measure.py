"""The input pipeline's figures: the command runs, and its numbers are those of the clock."""

import time

from lorweb_jax.data import measure


def test_rate_and_report(tmp_path, capsys):
    measure.write_pairs(tmp_path, height=64, tasks=2, pairs=3)
    start = time.perf_counter()
    rate = measure.measure_input(tmp_path, 32, workers=0, seconds=0.2)
    elapsed = time.perf_counter() - start
    assert 6 / elapsed < rate.grids_per_second < 20_000 and (rate.cpu_ms is None or rate.cpu_ms < 1000 * elapsed)
    measure.main(["--data", str(tmp_path), "--quadrant-size", "32", "--workers", "0", "--seconds", "0.1"])
    out = capsys.readouterr().out
    assert "grids of 64x64" in out and "| 0 | " in out and "four images resized" in out
