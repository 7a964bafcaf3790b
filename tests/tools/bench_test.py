"""The benchmark interleaves, divides and fits right; its processes, its page and its exit codes. Nothing is timed."""

import re
import sys

import numpy as np
import pytest

from tools import bench, bench_checkpoint, bench_hopfield, bench_loading, bench_measure, bench_worker
from tools.bench_measure import BenchError, Curve, Job, Measured, Page, Session

# A contender without any library: turns that say what they took, so that no clock is read.
FAKE = """
import itertools

from tools.bench_worker import Program, Ready, needed

def programs(scale, parameters=7, sizes=(1, 2, 4)):
    # The first two are preparation; then every turn follows one that is not counted.
    def took(size):
        for turn in range(99):
            yield from (9.0, scale * size * (1 + 0.1 * turn))

    turns = {size: itertools.chain([9.0, 9.0], took(size)) for size in sizes}
    return [
        Program(f"work {size}", lambda size=size: Ready(lambda: next(turns[size]), 1000 * size), parameters)
        for size in sizes
    ]

def product():
    return [Program("product", lambda: Ready(lambda: 0.5, 4096))]

def compiled_only():
    return [Program("work 1", lambda: Ready(None, facts={"temporary_bytes": 3.0}))]

def lacking():
    return [needed("no_such_package")]

def dying():
    raise KeyError("what went wrong")

def sleeping():
    import time
    time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "fake_contender.py").write_text(FAKE)
    root = str(bench_measure.Path(bench_measure.__file__).parents[1])

    def job(label, function="programs", settings=None, **fields):
        path = {"PYTHONPATH": f"{tmp_path}:{root}"}
        return Job(label, "fake_contender", function, settings or {}, imports=(), environment=path, **fields)

    return job


def measured(label, name, seconds, **fields):
    return Measured(label, name, tuple(seconds), 0.1, **fields)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_turns_alternate():
    order = []

    def turn(name):
        order.append(name)
        return float(len(order))

    found = bench_measure.interleave([lambda: turn("a"), lambda: turn("b")], 3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert found == [(1, 3, 5), (2, 4, 6)]


def test_a_ratio_is_of_rounds_and_not_of_medians():
    # A machine that is ten times slower in the second round: theirs takes twice as long in every one.
    one = bench_measure.ratio((1.0, 10.0, 1.0), (2.0, 20.0, 2.0))
    assert (one.median, one.low, one.high) == (2, 2, 2)
    assert str(bench_measure.ratio((1, 1, 1), (1.1, 3, 2))) == "2.00 (1.10 to 3.00)"
    for ours, theirs in (((1, 2), (1,)), ((), ())):
        with pytest.raises(ValueError, match="equally many and at least one"):
            bench_measure.ratio(ours, theirs)


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [((2, 3, 1.5), "faster"), ((0.5, 0.9, 0.8), "slower"), ((0.9, 1.2, 1.5), "no different in every round")],
)
def test_a_verdict_needs_every_round(theirs, verdict):
    assert bench_measure.ratio((1, 1, 1), theirs).verdict == verdict


def test_losses_are_told_first():
    pairs = {
        ("fast", "x"): bench_measure.Ratio(2, 1.5, 3),
        ("slow", "x"): bench_measure.Ratio(0.5, 0.4, 0.6),
        ("even", "x"): bench_measure.Ratio(1, 0.9, 1.1),
    }
    assert bench_measure.findings(pairs).splitlines() == [
        "- Beside x ours is slower: slow 0.50.",
        "- Beside x ours is no different in every round: even 1.00.",
        "- Beside x ours is faster in 1 of 3 comparisons, 2.00 to 2.00 times.",
    ]


def test_seconds_of_a_turn_are_the_clocks_or_what_the_turn_says():
    ticks = iter([10.0, 16.0])
    assert bench_worker.seconds_of(lambda: None, 3, lambda: next(ticks)) == 2
    said, ticks = iter([1.0, 2.0]), iter([0.0, 99.0])
    assert bench_worker.seconds_of(lambda: next(said), 2, lambda: next(ticks)) == 1.5
    assert [bench_worker.repeats_for(seconds, 0.1) for seconds in (0.03, 0.1, 5.0)] == [4, 1, 1]


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent):
    x = np.array([1.0, 2, 8, 64])
    fit = bench_measure.fit_power(x, 3 * x**exponent)
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert fit.constant == pytest.approx(3)
    assert fit.error < 1e-7
    # Negative control: what is no power law has an error that says so.
    assert bench_measure.fit_power(x, 3 * x**exponent * (1, 2, 1, 2)).error > 0.1


def test_the_error_of_an_exponent_is_that_of_least_squares():
    x, y = np.array([1.0, 2, 4, 8, 16]), np.array([1.0, 2.5, 3.5, 9, 15])
    fit = bench_measure.fit_power(x, y)
    coefficients, covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert (fit.exponent, fit.error) == pytest.approx((coefficients[0], covariance[0, 0] ** 0.5))
    assert str(bench_measure.fit_power((1, 10), (1, 10))) == "1.00 ± 0.00"


@pytest.mark.parametrize(("x", "y"), [((1, 1), (1, 2)), ((1, 2), (0, 1)), ((1,), (1,)), ((1, 2), (1,))])
def test_what_no_power_law_goes_through_is_refused(x, y):
    with pytest.raises(ValueError, match="must be positive, two different x"):
        bench_measure.fit_power(x, y)


def test_the_peak_is_that_of_the_fastest_product():
    found = [
        measured("matrix product, jax", "product", (2.0, 1.0, 1.5), macs=3000),
        measured("matrix product, torch", "product", (1.0,), macs=3000),
        measured("jaxlayers", "work", (1e-9,), macs=3000),
    ]
    assert bench_measure.peak_of(found) == 3000
    assert bench_measure.peak_of(found[2:]) == 0


# Processes ------------------------------------------------------------------------------------------------------------


def test_processes_are_measured_in_turn_and_compared(fake):
    lines = []
    session = Session(3, 0.0, 1, report=lines.append)
    found = session.measure(
        [fake("jaxlayers", settings={"scale": 0.01}), fake("theirs", settings={"scale": 0.03}), fake("p", "product")]
    )
    assert [(one.label, one.name) for one in found[:4]] == [
        ("jaxlayers", "work 1"), ("theirs", "work 1"), ("jaxlayers", "work 2"), ("theirs", "work 2"),
    ]  # fmt: skip
    # What the first turns took, compilation in real ones, is in no figure.
    assert found[0].seconds == pytest.approx((0.01, 0.011, 0.012))
    assert {str(one) for one in bench_measure.ratios(found).values()} == {"3.00 (3.00 to 3.00)"}
    assert bench_measure.peak_of(found) == 8192
    assert found[-1].peak_bytes > 0
    assert found[0].peak_bytes is None  # several programs share that process
    grown = bench_measure.curve(found, "theirs", "work", title="", x_name="size")
    assert grown.x == (1, 2, 4)
    assert grown.fit.exponent == pytest.approx(1)
    assert lines[0].startswith("jaxlayers, work 1: 11 ms, first ")


def test_programs_that_are_compiled_only_have_facts_and_no_time(fake):
    (found,) = Session(2, 0.0, 1).measure([fake("jaxlayers", "compiled_only")])
    assert found.seconds == ()
    assert found.facts == {"temporary_bytes": 3.0}


def test_contenders_with_other_parameters_are_refused(fake):
    jobs = [fake("jaxlayers", settings={"scale": 1.0}), fake("theirs", settings={"scale": 1.0, "parameters": 8})]
    with pytest.raises(BenchError, match="work 1 must have as many parameters everywhere; jaxlayers has 7, theirs 8"):
        Session(1, 0.0, 1).measure(jobs)
    # Negative control: where the work is said to differ, it may.
    jobs[1] = fake("theirs", settings={"scale": 1.0, "parameters": 8}, alike=False)
    assert len(Session(1, 0.0, 1).measure(jobs)) == 6


@pytest.mark.parametrize(
    ("function", "limit", "message"),
    [
        ("lacking", 60.0, "'no_such_package' must be importable, .* run: pip install no_such_package"),
        ("dying", 60.0, "theirs ended with 1: .*KeyError: 'what went wrong'"),
        ("sleeping", 1.0, "theirs was not ready within 1 seconds"),
    ],
)
def test_a_contender_that_fails_says_why_and_an_optional_one_is_left_out(fake, function, limit, message):
    with pytest.raises(BenchError, match=message):
        Session(1, 0.0, 1).measure([fake("theirs", function, limit=limit)])
    session = Session(1, 0.0, 1)
    jobs = [fake("jaxlayers", settings={"scale": 1.0}), fake("theirs", function, limit=limit, optional=True)]
    assert {one.label for one in session.measure(jobs)} == {"jaxlayers"}
    assert re.search(message, session.failures["theirs"])
    assert "/" not in session.failures["theirs"]
    jobs[1] = fake("theirs", settings={"scale": 1.0}, optional=True)
    assert {one.label for one in session.measure(jobs)} == {"jaxlayers"}  # not tried again


# The page -------------------------------------------------------------------------------------------------------------


def example():
    page = Page("window", "Title", ("numpy", "no-such-package"), "How.")
    page.product = [measured("matrix product, jax", "product", (0.5,), macs=1000)]
    page.found = [
        measured("jaxlayers", "work", (1.0, 1.0), macs=500, peak_bytes=2**20, program_bytes=2**19),
        measured("theirs", "work", (2.0, 3.0), peak_bytes=2**31),
    ]
    page.curves = [Curve("Time", "work", "size", "seconds", (1, 2, 4), (0.5, 0.2, 0.4), fitted=1)]
    page.tables["More"] = bench_measure.markdown(["a"], [["b"]])
    return page


def test_page_has_its_parts_in_order_and_no_path_of_the_machine(tmp_path):
    page, session = example(), Session(2, 0.1, 1, failures={"other": "too slow"})
    text = page.markdown("python -m tools.bench window", session, (0.5, 1.0))
    assert text.startswith("# Title\n\n    python -m tools.bench window\n\n- Machine: 1 core of ")
    versions = re.search(r"- Versions: (.*)\.\n", text)[1]
    assert re.fullmatch(r"python [\d.]+, numpy [\d.]+, git (none|[0-9a-f]{12}(\+changes)?)", versions)
    assert "2 interleaved rounds; load average 0.5 before and 1.0 after; memory of all contenders in huge pages" in text
    assert "a float32 product of 10 x 10 in the same run: 4e-06 GFLOP/s (jax)" in text
    assert "- Left out: other: too slow" in text
    assert "- Beside theirs ours is faster in 1 of 1 comparisons, 2.50 to 2.50 times." in text
    assert "| work | jaxlayers | 1 s (1 s to 1 s) |  | 100 ms | 1 MiB | 0.5 MiB | 5e-07 G | 25.0% |" in text
    assert "| work | theirs | 2.5 s (2 s to 3 s) | 2.50 (2.00 to 3.00) | 100 ms | 2 GiB |  | 5e-07 G | 10.0% |" in text
    assert "| work | seconds by size | 1: 500 ms; 2: 200 ms; 4: 400 ms | 1.00 ± 0.00, from 2 on |" in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Times", "Growth", "More", "What was measured"]
    assert sys.prefix not in text
    page.write(tmp_path, text)
    assert (tmp_path / "benchmarks" / "window.md").read_text() == text
    shown = re.search(r"\((\.\./images/.*\.png)\)", text)[1]
    picture = (tmp_path / "benchmarks" / shown).resolve()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < picture.stat().st_size < 300_000


def test_text_is_wrapped_and_lists_stay_lists():
    text = bench_measure.reflow("One " + "word " * 40 + "\n\n- a\n  b\n- c\n\nEnd\nhere")
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith("\n\n- a b\n- c\n\nEnd here")


def test_columns_without_anything_are_left_out():
    text = bench_measure.comparison([measured("jaxlayers", "work", (1.0,))], 0.0)
    assert text.splitlines()[0] == "| program | by | time of a turn (range) | first turn |"
    with pytest.raises(ValueError, match="a row of 2 cells must have 1"):
        bench_measure.markdown(["a"], [["b", "c"]])


@pytest.mark.parametrize(("size", "cell"), [(None, ""), (2**19, "0.5 MiB"), (3 * 2**30, "3 GiB")])
def test_sizes_are_told_in_their_unit(size, cell):
    assert bench_measure.cell_bytes(size) == cell


# The command ----------------------------------------------------------------------------------------------------------


class Stub:
    AGAINST = ("theirs",)

    def __init__(self, error=None):
        self.error, self.asked = error, None

    def bench(self, session, against, quick):
        self.asked = (session.rounds, against, quick)
        if self.error:
            raise self.error
        return example()


@pytest.fixture
def stub(monkeypatch):
    made = Stub()
    for name in bench.BENCHES:
        monkeypatch.setitem(sys.modules, f"tools.bench_{'loading' if name == 'input' else name}", made)
    return made


def test_command_prints_and_writes_the_page_with_itself_in_it(stub, capsys, tmp_path):
    given = ["checkpoint", "--quick", "--against", "theirs", "--docs", str(tmp_path)]
    assert bench.main(given) == 0
    assert stub.asked == (2, ("theirs",), True)
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "benchmarks" / "window.md").read_text() + "\n"
    assert "    python -m tools.bench checkpoint --quick --against theirs" in printed
    assert bench.main(["window"]) == 0
    assert stub.asked == (5, (), False)


def test_a_contender_that_cannot_be_measured_is_exit_code_1(stub, capsys, tmp_path):
    stub.error = BenchError("what to install")
    assert bench.main(["window", "--docs", str(tmp_path)]) == 1
    assert "error: what to install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["doors"], "invalid choice: 'doors'"),
        (["window", "--against", "ours"], "--against for window must be of theirs, got ours"),
        (["window", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["window", "--processor-time", "--threads", "2"], "--processor-time must come with --threads 1"),
        (["input", "--processor-time", "--threads", "1"], "and not for input and checkpoint, which wait"),
        (["window", "--threads", "100000"], "--threads must be at most the "),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(stub, given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_every_benchmark_names_its_rivals_and_its_jobs_exist():
    for name in bench.BENCHES:
        module = bench.importlib.import_module(f"tools.bench_{'loading' if name == 'input' else name}")
        assert module.AGAINST
        assert callable(module.bench)


@pytest.mark.parametrize("kind", ["ours", "files"])
def test_checkpoint_phases_count_what_they_name(kind, tmp_path, monkeypatch):
    ready = {one.name: one.prepare() for one in bench_checkpoint.programs(kind, [1], str(tmp_path))}
    assert list(ready) == ["save until it returns 1", "save until written 1", "restore 1"]
    for one in ready.values():
        assert 0 < one.turn() < 60
    (base,) = tmp_path.iterdir()
    assert sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) > 2**19
    # Negative control: a restore that gives other numbers is no restore.
    writer = {"ours": bench_checkpoint._Ours, "files": bench_checkpoint._Plain}[kind]
    monkeypatch.setattr(writer, "restore", lambda self, folder, state: {"layer_0": 0 * state["layer_0"]})
    with pytest.raises(AssertionError):
        ready["restore 1"].turn()


def test_rates_are_bytes_by_time():
    found = [measured("jaxlayers", "restore 2", (2.0, 2.0)), measured("Orbax", "restore 2", (1.0, 1.0))]
    rows = bench_checkpoint.rates(found).splitlines()[2:]
    assert rows == [
        "| restore | 2 MiB | jaxlayers | 1 MB/s |  |",
        "| restore | 2 MiB | Orbax | 2 MB/s | 0.50 (0.50 to 0.50) |",
    ]
    found = [measured("jaxlayers", f"a record, workers {count}", (0.1 / (count + 1),) * 2) for count in (0, 1)]
    rows = bench_loading.rates([*found, measured("timm", "a record, workers 1", (0.1, 0.1))]).splitlines()[2:]
    assert rows == [
        "| 0 | jaxlayers | 10.0 | 1.00 |  |",
        "| 1 | jaxlayers | 20.0 | 2.00 |  |",
        "| 1 | timm | 10.0 |  | 2.00 (2.00 to 2.00) |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.BENCHES)
def test_quick_run_of_every_benchmark(name, capsys, tmp_path):
    assert bench.main([name, "--quick", "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "benchmarks" / f"{name}.md").read_text()
    assert text.startswith("# ")
    assert (tmp_path / "images" / f"bench_{name}.png").stat().st_size > 5_000


def test_committed_pages_say_their_machine_versions_and_command():
    docs = bench_measure.Path(bench_measure.__file__).parents[1] / "docs"
    for name in bench.BENCHES:
        text = (docs / "benchmarks" / f"{name}.md").read_text()
        assert f"    python -m tools.bench {name}" in text
        assert re.search(r"^- Machine: \d+ cores? of ", text, re.M)
        assert re.search(r"^- Versions: python .*, git [0-9a-f]{12}", text, re.M)
        assert "--quick" not in text
        assert (docs / "images" / f"bench_{name}.png").stat().st_size < 300_000


def test_training_in_chunks_stands_beside_the_same_rival_with_the_work_of_the_plain_form():
    name = "Hopfield, training, patterns 16"
    found = [
        Measured(bench_hopfield.OURS, name, (2.0,), 0.1, macs=100),
        Measured(bench_hopfield.CHUNKED, name, (1.0,), 0.1, macs=130),
        Measured("rival", name, (3.0,), 0.1),
    ]
    chunks = bench_hopfield.in_chunks(found)
    assert [(one.label, one.macs) for one in chunks] == [(bench_hopfield.OURS, 100), ("rival", 100)]
    assert {one.name for one in chunks} == {f"Hopfield in chunks of {bench_hopfield.TRAINED}, training, patterns 16"}
    plain = [one for one in found if one.label != bench_hopfield.CHUNKED]
    ratios = bench_measure.ratios([*plain, *chunks])
    assert [one.median for one in ratios.values()] == [1.5, 3.0]
