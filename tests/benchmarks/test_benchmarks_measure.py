"""The plumbing of the benchmarks: processes in turn, their memory, medians, tables and pictures."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from benchmarks import measure

MB = 2**20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_round_runs_all_and_turns_the_order(tmp_path):
    log = tmp_path / "log"
    write = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    commands = {name: [*python(write), str(log), name] for name in "abc"}
    runs = measure.run_in_turn(commands, 3)
    assert log.read_text() == "abccbaabc"
    assert {name: len(done) for name, done in runs.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(run.values == {} for done in runs.values() for run in done)


def test_what_a_process_prints_last_and_what_it_took():
    run = measure.run_once(
        python("import json, os, time; time.sleep(0.1); print('x'); print(json.dumps({'n': os.environ['N']}))"),
        env={"N": "7"},
    )
    assert run.values == {"n": "7"}
    assert 0.1 < run.seconds < 10


def test_the_memory_is_that_of_the_process():
    code = (
        "import resource; x = b'x' * {}; print('{{\"own\": %d}}' % resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    for run in (measure.run_once(python(code.format(300 * MB))), measure.run_once(python(code.format(900 * MB)))):
        assert abs(run.peak_bytes - run.values["own"] * 1024) < 8 * MB
    assert run.peak_bytes > 900 * MB


def test_a_process_that_fails_says_why():
    with pytest.raises(measure.RunFailedError, match="exit status 3\nbecause"):
        measure.run_once(python("import sys; print('because', file=sys.stderr); sys.exit(3)"))


def test_medians_are_of_numbers_only():
    runs = [
        measure.Run(seconds, 0.5, 10, {"n": n, "name": "x", "ok": True})
        for seconds, n in ((3.0, 1), (1.0, 5), (2.0, 4))
    ]
    assert measure.medians(runs) == {"seconds": 2.0, "cpu_seconds": 0.5, "peak_bytes": 10, "n": 4}


def test_table_json_and_picture(tmp_path):
    assert measure.text_table(["what", "ours"], [["a longer one", "1"], ["b", "20"]]) == (
        "what          ours\na longer one     1\nb               20"
    )
    figures = {"machine": measure.machine(), "ours": {"seconds": 1.5}}
    measure.write_results(tmp_path / "new/results.json", figures)
    assert json.loads((tmp_path / "new/results.json").read_text()) == figures
    assert {"cpu", "cores", "packages"} <= figures["machine"].keys()
    groups = {"fp32": {"ours": 2.0, "peer": 1.0}, "bf16": {"ours": 3.0}}
    measure.draw_bars(tmp_path / "bars.png", "Two peers", {"tokens/s": groups, "s": groups})
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "new"]
