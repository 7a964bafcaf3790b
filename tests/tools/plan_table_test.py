"""The table of configs is written line by line and goes on where it stopped."""

from tests.tools.plan_test import V5E, answered
from tools import plan_predict, plan_table


def test_lines_hold_what_matters_and_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    asked = []

    def answer(jobs, python, devices):
        asked.append(jobs[0].config)
        yield {"error": "no such thing"} if "bad" in jobs[0].config else answered()

    monkeypatch.setattr(plan_table, "run_jobs", answer)
    out = tmp_path / "table.md"
    arguments = ["configs/one.py", "configs/bad.py", "--topology", V5E.name, "--out", str(out)]
    assert plan_table.main(arguments) == 1
    assert "bad: no such thing" in capsys.readouterr().err
    (line,) = out.read_text().splitlines()[2:]
    assert line == plan_table.row("one", plan_predict.report(answered(), V5E, "configs/one.py"))
    assert line == "| `one` | data=4 | 512 | 7 | 8.25 GiB | 11 ms | 50.0% | `stages_0/blocks_0/down` <dot & general> |"
    asked.clear()
    assert plan_table.main([*arguments[:1], *arguments[2:]]) == 0
    assert not asked
