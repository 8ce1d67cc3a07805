"""Measuring: what is measured, in which order, and what a record says."""

import json
import time

import pytest
import torch

from rdrop.bench import linear, rows
from rdrop.bench.measure import CLOCKS, BenchError, Conditions, measure, record
from rdrop.bench.records import append, comparisons, read
from rdrop.bench.suite import Sizes, run
from rdrop.kernels import available

pytestmark = pytest.mark.skipif(available()["cpu"] is not None, reason=str(available()["cpu"]))

QUICK = Conditions(rounds=2, compiled=False, command="rdrop bench")


def test_rounds_are_interleaved_and_only_the_call_is_timed(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setitem(CLOCKS, "wall", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    def prepared(name, seconds):
        def prepare():
            passes(100.0)
            return lambda: order.append(name) or passes(seconds)

        return prepare

    found = measure({"a": prepared("a", 1.0), "b": prepared("b", 5.0)}, QUICK)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 2
    assert list(found["a"].seconds) == [1.0, 1.0]
    assert list(found["b"].seconds) == [5.0, 5.0]


def test_what_only_the_first_call_keeps_is_not_its_memory():
    kept = []

    def call():
        if not kept:
            kept.append(torch.ones(10_000_000))

    found = measure({"a": lambda: call}, QUICK)["a"].peak_extra_bytes
    if found is None:
        pytest.skip("this system does not tell")
    assert found < 2_000_000


def test_the_processors_clock_is_that_of_all_threads_which_waiting_does_not_move(monkeypatch):
    assert CLOCKS["processor"] is time.process_time
    now = {"wall": 0.0, "processor": 0.0}
    for clock in now:
        monkeypatch.setitem(CLOCKS, clock, lambda clock=clock: now[clock])

    def wait_and_compute():
        now["wall"] += 5.0
        now["processor"] += 1.0

    for clock, seconds in (("wall", 5.0), ("processor", 1.0)):
        found = measure({"a": lambda: wait_and_compute}, Conditions(rounds=2, clock=clock))
        assert list(found["a"].seconds) == [seconds, seconds]


@pytest.mark.parametrize("megabytes", [40, 100])
def test_peak_memory_is_what_a_call_had_at_once_though_it_gave_it_back(megabytes):
    def call():
        for _ in range(3):
            torch.ones(megabytes * 250_000)

    found = measure({"a": lambda: call}, QUICK)["a"].peak_extra_bytes
    if found is None:
        pytest.skip("this system does not tell")
    assert abs(found - megabytes * 1_000_000) < 2_000_000


def test_a_form_that_does_not_fit_into_memory_is_recorded_as_that():
    def call():
        raise torch.OutOfMemoryError

    found = measure({"a": lambda: call, "b": lambda: lambda: None}, QUICK)
    assert record("rows", "a", "", found["a"], QUICK)["median"] is None
    assert len(found["b"].seconds) == QUICK.rounds


def test_a_record_names_all_that_is_needed_to_measure_again():
    [first, *_] = rows.measure_rows(4, 10, QUICK)
    assert {"what", "unit", "median", "p20", "p80", "rounds", "peak_extra_bytes", "command", "commit"} <= set(first)
    assert (first["pairs"], first["classes"], first["dtype"], first["threads"]) == (4, 10, "float32", 1)
    assert first["p20"] <= first["median"] <= first["p80"]
    assert set(first["versions"]) == {"rdrop", "torch", "python"}
    assert json.loads(json.dumps(first)) == first


def test_records_are_appended_and_a_later_one_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "records.jsonl"
    one, two = ([{"benchmark": "rows", "pairs": 4, "form": form, "median": m}] for form, m in (("a", 1.0), ("b", 2.0)))
    append(one + two, path)
    append([{**one[0], "median": 3.0}, {**one[0], "pairs": 5}], path)
    assert [[r["median"] for r in found] for found in comparisons(read(path))] == [[3.0, 2.0], [1.0]]


# ------------------------------------------------------------------------------------------------ the forms


def loss_and_gradient(form, tensor, labels):
    leaf = tensor.clone().requires_grad_()
    loss = form(leaf * 1, labels)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("name", ["tidy", "ours_reference", "ours", "ours_overwriting"])
def test_the_forms_from_logits_compute_the_same_loss_and_gradient(name):
    logits, labels = rows.problem(20, 30, QUICK)
    forms = rows.forms(Conditions(forms=("official", name)))
    expected = loss_and_gradient(forms["official"], logits, labels)
    torch.testing.assert_close(loss_and_gradient(forms[name], logits, labels), expected, rtol=1e-4, atol=1e-6)


def test_our_cross_entropy_is_that_of_pytorch():
    logits, labels = rows.problem(20, 30, QUICK)
    forms = rows.forms(QUICK)
    ours, torchs = (loss_and_gradient(forms[n], logits, labels) for n in ("ours_cross_entropy", "cross_entropy"))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(
    ("name", "other"), [("ours", "official"), ("tidy", "official"), ("ours_cross_entropy", "cross_entropy")]
)
def test_the_forms_from_hidden_states_compute_the_same_loss_and_gradient(name, other):
    hidden, weight, labels = linear.problem(20, 8, 30, QUICK)
    forms = linear.forms(weight, QUICK)
    one, another = (loss_and_gradient(forms[n], hidden, labels) for n in (name, other))
    torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-6)


def test_the_products_alone_are_those_of_a_loss_whose_gradient_is_the_logits():
    hidden, weight, labels = linear.problem(20, 8, 30, QUICK)
    _, gradient = loss_and_gradient(linear.forms(weight, QUICK)["products"], hidden, labels)
    torch.testing.assert_close(gradient, hidden @ weight.T @ weight)


def test_without_compile_and_names_all_forms_but_the_reference_are_measured():
    names = set(rows.forms(Conditions()))
    assert {"cross_entropy_compiled", "tidy_compiled", "official", "ours", "ours_overwriting"} <= names
    assert "ours_reference" not in names
    assert set(rows.forms(QUICK)) == {name for name in names if not name.endswith("_compiled")}
    assert set(rows.forms(Conditions(forms=("ours_reference",)))) == {"cross_entropy", "ours_reference"}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
def test_compiled_forms_compute_what_eager_ones_do():
    logits, labels = rows.problem(20, 30, QUICK)
    hidden, weight, _ = linear.problem(20, 8, 30, QUICK)
    for forms, tensor in ((rows.forms(Conditions()), logits), (linear.forms(weight, Conditions()), hidden)):
        for name in ("cross_entropy", "tidy"):
            one, another = (loss_and_gradient(forms[n], tensor, labels) for n in (name, f"{name}_compiled"))
            torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, r"device \(='tpu'\) must be one of \('cpu', 'cuda'\)"),
        ({"dtype": "float8"}, r"dtype \(='float8'\) must be one of"),
        ({"clock": "sun"}, r"clock \(='sun'\) must be one of \('wall', 'processor'\)"),
        ({"rounds": 0}, r"rounds \(=0\) and threads \(=1\) must be >= 1"),
        ({"dtype": "float16"}, "dtype='float16' has no kernel on a CPU; take 'float32' or 'bfloat16'"),
    ],
)
def test_conditions_that_cannot_be_are_refused(options, message):
    with pytest.raises(BenchError, match=message):
        Conditions(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(BenchError, match="torch sees no CUDA device here; take device='cpu'"):
        Conditions(device="cuda")


def test_what_is_no_benchmark_and_no_form_is_named_before_anything_is_measured(tmp_path):
    with pytest.raises(BenchError, match=r"benchmark \(='weights'\) must be one of \('logits', 'hidden', 'steps'\)"):
        run(["weights"], Sizes(), QUICK, None, tmp_path / "x")
    with pytest.raises(BenchError, match=r"form \(='mine'\) must be one of \('cross_entropy', "):
        run(["logits"], Sizes(), Conditions(forms=("mine",)), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()
