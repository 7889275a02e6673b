"""The suites refuse what is wrong, time what they say, and the documents show their results."""

import copy
import dataclasses
import functools
import math
import os
import time

import pytest
import torch

from bae_fast import reference
from bae_fast.files import write_json
from bae_fast.ops import registry
from bench import (
    ceilings,
    crossover,
    documents,
    eager,
    exact,
    imports,
    inputs,
    jobs,
    levels,
    memory,
    models,
    operators,
    pairs,
    rates,
    rival,
    search,
    sparse,
    step,
    tables,
    timing,
    versions,
    wide,
)
from bench.__main__ import MEASURED, OWN, RESULTS, ROOT, SUITES, TRAINED, environment, main
from bench.inputs import TINY

DEFAULT = inputs.implementations()[0]
needs_linux = pytest.mark.skipif(
    not memory.Path("/proc/self/status").exists(), reason="reads /proc/self/status"
)


# -- what is checked against -------------------------------------------------------------------


@pytest.mark.parametrize("name", step.OBJECTIVES)
def test_the_formulas_at_full_size_equal_autograd_through_the_reference(name):
    objective = step.OBJECTIVES[name]
    x, *parameters = (t.double() for t in inputs.tensors(*TINY[0], objective.density))
    parameters = [p.requires_grad_() for p in parameters]
    out = reference.binary_autoencoder(
        x, *parameters, surrogate=objective.surrogate, width=inputs.WIDTH,
        covariance=objective.covariance,
    )  # fmt: skip
    loss = reference.loss(out, x, 1e-3, 1e-3)
    loss.backward()
    pre = (x @ parameters[0] + parameters[1]).detach()
    features = torch.randperm(TINY[0][2])[:100]
    found = exact.training_gradients(
        x, parameters, pre > 0, None if objective.width is None else pre.abs() < objective.width,
        features, entropy_weight=1e-3,
        covariance_weight=1e-3 if objective.covariance else None,
    )  # fmt: skip
    W_enc, b_enc, W_dec, b_dec = (p.grad for p in parameters)
    right = (loss, W_enc[:, features], b_enc[features], W_dec[features], b_dec)
    for got, expected in zip(found[:5], right, strict=True):
        assert exact.relative_error(got, expected.detach()) < 1e-12


def test_the_covariance_by_blocks_equals_the_reference(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK", 100)
    bits = (torch.rand(40, 331) < 0.3).float()
    dense = bits.double().requires_grad_()
    n = torch.tensor(40.0, dtype=torch.float64)
    value = reference.absolute_covariance(dense.t() @ dense, dense.sum(0), n)
    assert exact.covariance_numerator(bits) == round(value.item() * 40 * 39)
    left = torch.randn(40, 5, dtype=torch.float64)
    found, slack = exact.covariance_gradient(bits, left)
    expected = left.t() @ torch.autograd.grad(value, dense)[0]
    assert exact.relative_error(found, expected) < 1e-12
    assert bool((slack > 0).any())  # N = 40 has ties


# -- refusal -----------------------------------------------------------------------------------


def spoiled(result, index, change):
    if not isinstance(result, tuple):
        return change(result)
    return tuple(change(part) if i == index else part for i, part in enumerate(result))


def flip_a_bit(words):
    words = words.clone()
    words[0, 0] ^= 1
    return words


def scale_a_column(numbers):
    numbers = numbers.clone()
    numbers[..., 5] *= 1.01
    return numbers


# operator of the suite -> operator of the backend, which result, what is done to it
FAULTS = {
    "encode": ("encode", 0, flip_a_bit),
    "decode": ("decode", 0, scale_a_column),
    "decoder_backward": ("decoder_backward", 0, scale_a_column),
    "covariance": ("covariance", 0, lambda numerator: numerator + 2),
    "covariance_backward": ("encoder_backward", 1, scale_a_column),
    "encoder_backward": ("encoder_backward", 1, scale_a_column),
}


@pytest.fixture
def faulty(monkeypatch):
    def install(operator):
        name, index, change = FAULTS[operator]
        right = registry.BACKENDS[DEFAULT].ops[name]
        monkeypatch.setitem(
            registry.BACKENDS[DEFAULT].ops,
            name,
            lambda *args: spoiled(right(*args), index, change),
        )

    return install


def row_of(comparison, *names):
    """The row of some of the sides."""
    sides = {name: comparison.sides[name] for name in names}
    return timing.compare(comparison._replace(sides=sides), seconds=0)


@pytest.mark.parametrize("operator", FAULTS)
def test_a_wrong_operator_gets_no_figure(operator, faulty):
    faulty(operator)
    row = row_of(operators.build(operator, *TINY[0], 0.5), "eager", DEFAULT)
    assert row["sides"][DEFAULT].keys() == {"refused"}
    assert row["sides"]["eager"]["seconds"] > 0
    assert "refused" in tables.line(row)


@pytest.mark.parametrize("operator", ["decode", "decoder_backward", "encoder_backward"])
def test_a_wrong_operator_spoils_the_step(operator, faulty):
    faulty(operator)
    row = row_of(step.build("paper", *TINY[0]), "eager", DEFAULT)
    assert row["sides"][DEFAULT].keys() == {"refused"}


RIVAL = (66, 24, 331, 5)


@pytest.mark.parametrize("operator", ["decode", "decoder_backward", "encoder_backward"])
def test_a_wrong_operator_spoils_the_step_of_the_recipe(operator, faulty):
    row = row_of(rival.build(*RIVAL), "topk", DEFAULT, f"{DEFAULT} bf16")
    assert all(side["seconds"] > 0 for side in row["sides"].values())
    faulty(operator)
    row = row_of(rival.build(*RIVAL), "topk", DEFAULT)
    assert row["sides"][DEFAULT].keys() == {"refused"}
    assert row["sides"]["topk"]["seconds"] > 0


def test_a_wrong_topk_gets_no_figure(monkeypatch):
    right = rival.topk_parts

    def wrong(x, parameters, k):
        loss, indices, values = right(x, parameters, k)
        return loss, (indices + 1) % len(parameters[2]), values

    monkeypatch.setattr(rival, "topk_parts", wrong)
    assert row_of(rival.build(*RIVAL), "topk")["sides"]["topk"].keys() == {"refused"}


needs_cpp = pytest.mark.skipif(DEFAULT != "cpp", reason="lists and bits are forms of impl='cpp'")


@needs_cpp
def test_lists_bits_eager_and_the_floor_program_agree():
    for comparison in sparse.build(70, 331, 9):
        sides = timing.compare(comparison, seconds=0)["sides"]
        assert len(sides) >= 2
        assert all(side["seconds"] > 0 for side in sides.values())


@needs_cpp
@pytest.mark.parametrize("name", ["covariance", "encoder_backward"])
def test_a_wrong_form_gets_no_figure(name, monkeypatch):
    right = registry.BACKENDS["cpp"].ops[name]
    index = {"covariance": 0, "encoder_backward": 1}[name]

    def wrong(*args):
        result = list(right(*args))
        result[index] = result[index] + 1
        return tuple(result)

    monkeypatch.setitem(registry.BACKENDS["cpp"].ops, name, wrong)
    _, both = sparse.build(70, 331, 9)
    sides = timing.compare(both, seconds=0)["sides"]
    assert all(side.keys() == {"refused"} for side in sides.values())


@needs_cpp
@pytest.mark.usefixtures("one_process")
def test_the_table_of_sparse_codes_has_a_line_a_size():
    result = sparse.run(
        seconds=0,
        features=(331, 700),
        n=70,
        steps=((66, 24, 331),),
        banks=((90, 700),),
        memories=((66, 24, 331),),
    )
    table, step, bank, memory_of_step = sparse.table(result).split("\n\n")
    assert step.startswith("A whole training step at N, d, F = 66, 24, 331 takes")
    assert memory_of_step.startswith("Peak memory of a whole step with the covariance at N, d, F =")
    assert bank.startswith("The numerator of a bank of 90 rows at F = 700 takes")
    header, _, *lines = table.splitlines()
    assert [line.split()[1] for line in lines] == ["331", "700"]
    assert {line.count("|") for line in lines} == {header.count("|")}


@needs_cpp
def test_crossover_takes_the_density_nearest_to_equal_times_and_restores_the_costs():
    before = dict(sparse.cpp_covariance.LIST_COST)
    result = crossover.run(only="scalar", seconds=0, sizes=((70, 331),), densities=(0.05, 0.3))
    assert before == sparse.cpp_covariance.LIST_COST
    nearest = min(
        result["rows"], key=lambda r: abs(math.log(r["both"]["lists"] / r["both"]["bits"]))
    )
    assert result["cost"] == {"scalar": nearest["both"]["cost"]}
    assert "LIST_COST at scalar" in crossover.table(result)


@needs_cpp
@pytest.mark.usefixtures("one_process")
def test_pairs_are_the_same_with_and_without_kernels_and_a_wrong_count_is_refused(monkeypatch):
    before = os.environ.get(registry.ENV_IMPL)
    cases = [(what, 300, 150, 20) for what in ("pairs", "entropy", "neighbours")]
    monkeypatch.setattr(pairs, "CASES", cases)
    result = pairs.run(seconds=0)
    assert tables.refusals(result["rows"], tables.case_of) == []
    assert "refused" not in pairs.table({"environment": environment(), **result})
    assert os.environ.get(registry.ENV_IMPL) == before
    comparison = pairs.build(*cases[0])
    wrong = comparison.sides["kernel"].run()
    wrong[0][3, 5] += 1
    with pytest.raises(exact.WrongResultError, match="pairs of kernel differ"):
        comparison.check("kernel", wrong)


def test_trained_densities_are_those_that_were_asked_for():
    (x, W_enc, b_enc, *_), width = rival.trained(2000, 64, 1500, 12)
    pre = x @ W_enc + b_enc
    ones, inside = (pre > 0).float().mean(), (pre.abs() < width).float().mean()
    assert ones == pytest.approx(24 / 1500, rel=0.1)
    assert inside == pytest.approx(rival.WINDOW * 24 / 1500, rel=0.1)
    assert (pre > 0).float().mean(0).std() > 0.5 * ones


def test_the_table_of_rivals_holds_best_against_best(quick, monkeypatch):
    monkeypatch.setattr(rival, "CASES", [RIVAL])
    result = {"environment": environment(), **rival.run(seconds=0)}
    header, _, line = [t for t in rival.table(result).splitlines() if t.startswith("|")]
    assert header.count("|") == line.count("|")
    assert line.startswith("| 66, 24, 331, 5 |")
    seconds = {n: s["seconds"] for n, s in result["rows"][0]["sides"].items()}
    topk = min(t for n, t in seconds.items() if n.startswith("topk"))
    ours = min(t for n, t in seconds.items() if not n.startswith("topk"))
    assert line.endswith(f"| {topk / ours:.1f} |")


def test_a_wrong_dense_program_gets_no_figure_either(monkeypatch):
    right = eager.absolute_covariance
    monkeypatch.setattr(eager, "absolute_covariance", lambda bits: 1.01 * right(bits))
    row = row_of(operators.build("covariance", *TINY[0], 0.5), "eager", DEFAULT)
    assert row["sides"]["eager"].keys() == {"refused"}
    assert "ratio" not in row["sides"][DEFAULT]


def test_an_operator_that_raises_is_refused_with_the_reason(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(registry.BACKENDS[DEFAULT].ops, "decode", broken)
    row = row_of(operators.build("decode", *TINY[0], 0.5), DEFAULT)
    assert row["sides"][DEFAULT] == {"refused": "RuntimeError: no such luck"}


def test_a_program_that_does_not_compile_is_said_and_refuses_nothing(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(eager, "COMPILER", broken)
    row = row_of(operators.build("decode", *TINY[0], 0.5), "compile", DEFAULT)
    assert "no C++ compiler" in row["sides"]["compile"]["unavailable"]
    assert "does not compile" in tables.line(row)
    assert row["sides"][DEFAULT]["seconds"] > 0


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The whole of ``python -m bench operators`` in a second, writing elsewhere."""
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("bench.__main__.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- bench:operators --><!-- /bench:operators -->\n")
    monkeypatch.setattr(operators, "SHAPES", TINY)
    monkeypatch.setattr(operators, "SHOWN", TINY[0])
    monkeypatch.setattr(operators, "OPERATORS", {"covariance": operators.covariance})
    for name, value in {"GEMM_SIDE": 64, "COPY_BYTES": 2**16, "TRY_SECONDS": 0.0}.items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(ceilings, "PROBE_SECONDS", 0.001)
    return tmp_path


@pytest.fixture
def one_process(monkeypatch):
    """Sides that would have processes of their own, in this one: for what is not measured."""

    def measured(side, result):
        names = ("n", "d", "f", "impl", "objective", "threads")
        return memory.measure(side, **{name: result[name] for name in names})

    monkeypatch.setattr(memory, "in_fresh_process", measured)


def test_a_suite_ends_with_a_status_and_its_table(quick, faulty, capsys):
    run = functools.partial(main, ["operators", "--seconds", "0"])
    assert run() == 0
    lines = (quick / "README.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(inputs.DENSITIES)
    assert (quick / "operators.json").is_file()
    faulty("covariance")
    assert run() == 1
    assert "| refused |" in (quick / "README.md").read_text()
    assert "the numerator is" in capsys.readouterr().err


def test_the_table_of_steps_has_a_line_a_case_and_a_cell_a_side(quick, monkeypatch):
    monkeypatch.setattr(step, "CASES", step.TINY_CASES[:1])
    result = {"environment": environment(), **step.run(seconds=0)}
    header, _, line = [t for t in step.table(result).splitlines() if t.startswith("|")]
    assert all(name in header for name in step.sides_of(TINY[0][-1]))
    assert header.count("|") == line.count("|")
    assert line.startswith("| paper | 66, 24, 331 |")
    assert line.count("ms") == len(step.sides_of(TINY[0][-1]))
    assert "%" in line or inputs.simd() not in result["ceilings"]["bit_macs"]  # of the floor
    assert result["rows"][0]["sides"]["eager"]["flops_per_second"] > 0


def test_a_partial_run_writes_nothing(quick):
    before = (quick / "README.md").read_text()
    assert main(["operators", "--only", "covariance-66", "--seconds", "0"]) == 0
    assert [path.name for path in quick.iterdir()] == ["README.md"]
    assert (quick / "README.md").read_text() == before


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "got 'speed'" in capsys.readouterr().err


# -- measuring ---------------------------------------------------------------------------------


def test_sides_take_turns_and_preparing_is_not_timed():
    calls = []

    def side(name):
        return timing.Side(calls.append, lambda: (time.sleep(0.02), (name,))[1])

    times = timing.interleaved({"a": side("a"), "b": side("b")}, seconds=0)
    assert "".join(calls) == "baabba"
    assert len(times["a"]) == len(times["b"]) == timing.LEAST
    assert max(times["a"] + times["b"]) < 0.02


@needs_linux
def test_the_peak_is_what_a_call_makes_and_drops():
    size = 2**26
    assert timing.peak_bytes(lambda: torch.ones(size // 4)) > 0.9 * size
    assert timing.peak_bytes(lambda: None) < size // 4


@needs_linux
def test_memory_that_would_not_fit_is_said_to_be_arithmetic(monkeypatch):
    right = memory.available_bytes
    assert right() > 0
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    monkeypatch.setattr(
        memory, "in_fresh_process", lambda side, case: {"side": side, "peak_bytes": 2**20}
    )
    found = memory.compare(64, 16, 1024, impl="torch", objective="paper")
    assert found["dense"] == {
        "side": "dense", "peak_bytes": 16 * 1024**2, "arithmetic": True,
    }  # fmt: skip
    assert "arithmetic" in memory.table({"rows": [found]})


@pytest.mark.matrix
@pytest.mark.skipif(DEFAULT != "cpp", reason="the compiled kernels are not there")
def test_a_level_is_measured_in_its_own_process_or_missing_with_the_reason():
    scalar = levels.run(only="scalar", seconds=0, shape=TINY[0])
    assert [row["level"] for row in scalar["rows"]] == ["scalar", "scalar"]
    assert all("seconds" in row["sides"]["cpp"] for row in scalar["rows"])
    assert "`scalar`" in levels.table(scalar)


def test_the_probe_knows_the_level_in_use(quick):
    found = ceilings.measure()
    assert found["gemm_float32"] > 0
    assert found["copy"] > 0
    if ceilings._probe() is not None and inputs.simd() in ("scalar", "avx2", "avx512", "amx"):
        assert found["bit_macs"][inputs.simd()] > 0


def test_eight_jobs_and_eight_runs_learn_the_same(monkeypatch):
    """Both sides do the same work, and neither has more to do before it."""
    for name, small in (("ROUNDS", 1), ("WIDTH", 8), ("N_ROWS", 1024), ("BATCH", 64)):
        monkeypatch.setattr(jobs, name, small)
    learned, made = [], []

    class Kept(jobs.JobTrainer):
        def __init__(self, given, supply):
            made.append(len(given))
            super().__init__(given, supply)

        def fit(self):
            super().fit()
            found = {name: one.model.state_dict() for name, one in self.learners.items()}
            learned.append(found)

    monkeypatch.setattr(jobs, "JobTrainer", Kept)
    row = {"case": "memory", "steps": 3, **jobs.memory_case(3), "ratio": 0.5}
    assert sorted(made) == [1] * 8 + [8]
    together = next(found for found in learned if len(found) == 8)
    apart = {name: state for found in learned if len(found) == 1 for name, state in found.items()}
    assert together.keys() == apart.keys()
    for name, state in apart.items():
        assert all(torch.equal(together[name][key], value) for key, value in state.items())
    place = {"cpu": "a", "threads": 1, "torch": "2"}
    assert "| 0.50 |" in jobs.table({"rows": [row], "environment": place})


def test_both_rules_of_the_density_agree_up_to_sixteen_features_a_dimension():
    rows = torch.randn(1200, 12, generator=torch.Generator().manual_seed(0))
    split = wide.principal(rows[:1000], rows[1000:], 4)
    assert split[0].shape == (1000, 4)
    narrow = [wide.train_one(16, rule, *split, 2) for rule in wide.RULES]
    assert {**narrow[0], "rule": ""} == {**narrow[1], "rule": ""}
    first = [wide.train_one(64, rule, *split, 2)["first_ones"] for rule in wide.RULES]
    assert first[1] > 3 * first[0]


# -- the documents -----------------------------------------------------------------------------


def test_the_documents_show_the_committed_results():
    made = documents.blocks(RESULTS, SUITES | OWN)
    pages = {path: path.read_text(encoding="utf-8") for path in documents.documents(ROOT)}
    for path, text in pages.items():
        assert documents.regenerated(text, made, RESULTS) == text, (
            f"{path}: python -m bench --tables"
        )
    shown = "".join(pages.values())
    assert all(shown.count(f"<!-- bench:{name} -->") == 1 for name in made)
    found = {path.stem for path in RESULTS.glob("*.json")}
    assert (MEASURED | TRAINED).keys() <= found <= SUITES.keys() | OWN.keys()


def test_a_number_in_a_document_is_that_of_the_result(tmp_path):
    result = {"rows": [{"name": "a", "n": 1}, {"name": "b", "n": 2, "deep": [0.25]}]}
    write_json(tmp_path / "some.json", result)
    text = (
        "<!-- some: rows[name=b].deep.0 as .0% -->9<!-- / --> of "
        "<!-- some: rows[*].n as d x3 --><!-- / -->"
    )
    found = documents.figures(text, tmp_path)
    assert "-->25%<!--" in found
    assert "-->3<!--" in found
    assert documents.figures(found, tmp_path) == found
    for path in ("rows[name=c].n", "rows[name=a].m", "nothing"):
        with pytest.raises(ValueError, match="path must"):
            documents.figures(f"<!-- some: {path} as d -->1<!-- / -->", tmp_path)


def test_tables_replace_what_stands_between_their_markers():
    text = "a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb\n"
    assert tables.splice(text, "x", "new") == "a\n<!-- bench:x -->\nnew\n<!-- /bench:x -->\nb\n"
    with pytest.raises(ValueError, match="text must hold"):
        tables.splice(text, "y", "new")


def rate_run(method, seed, support, l0, kl, **variant):
    coded = {"tree_support": support, "l0": l0}
    scores = {"description": coded, "rounded": {"kl_by_value_bits": kl}}
    return {"method": method, "variant": variant, "seed": seed, "scores": scores, "settings": {}}


def test_losses_at_equal_bits_lie_on_the_line_between_runs(tmp_path, monkeypatch):
    def law(bits):
        return 50 / bits**1.5

    # 80, 120 and 200 bits on the law; 130 bits with more loss than 120 count for nothing
    topk = [
        rate_run("topk", 0, 40, 20.0, {"2": law(80), "4": law(120)}),
        rate_run("topk", 0, 100, 10.0, {"3": law(110), "10": law(200)}),
        rate_run("topk", 1, 70, 10.0, {"1": 2 * law(80), "13": 2 * law(200)}),
    ]
    bae = [rate_run("bae", 0, 120, 30.0, {"0": 0.25}), rate_run("bae", 0, 160, 40.0, {"0": 0.16})]
    tail = [rate_run("bae", 0, 150, 30.0, {"0": 0.125}, kl_tail=200)]
    tail += [rate_run("topk", 0, 110, 20.0, {"2": 0.1}, kl_tail=200)]
    write_json(tmp_path / "some" / "compare.json", {"runs": topk[1:] + bae})
    write_json(tmp_path / "more" / "compare.json", {"runs": topk[:1] + tail})
    monkeypatch.setattr(rates, "SMALL_SOURCES", {"a model": (("some", "more"),)})
    monkeypatch.setattr(rates, "SMALL_BITS", (100, 125, 150, 175))
    _, _, *lines = rates.equal_bits_small(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    expected = [
        f"{1.5 * law(b):.3f} ({law(b):.3f} to {2 * law(b):.3f})" for b in (100, 125, 150, 175)
    ]
    # the binary code's losses at the two numbers of bits that its runs have between them
    slope = math.log(0.16 / 0.25) / math.log(160 / 120)
    own = [0.25 * (bits / 120) ** slope for bits in (125, 150)]
    for at, bits in ((1, 125), (2, 150)):
        expected[at] += f", {1.5 * law(bits) / own[at - 1] - 1:+.0%}"
    assert cells[0] == ["a model", "none", "no", "TopK", *expected]
    # half way in the logarithm of bits is half way in that of the loss
    assert rates.at([(120, 0.25), (160, 0.16)], math.sqrt(120 * 160)) == pytest.approx(0.2)
    assert cells[1] == ["a model", "none", "no", "BAE (sparse)", "", *[f"{x:.3f}" for x in own], ""]
    # a rival is held against the binary code with the same tail
    assert cells[2] == ["a model", "none", "200 steps", "BAE (sparse)", "", "", "0.125", ""]
    assert cells[3] == ["a model", "none", "200 steps", "TopK", "", "", "0.100, -20%", ""]
    # what rounds to no difference has no sign
    at_150 = rate_run("topk", 0, 110, 20.0, {"2": 0.1249}, kl_tail=200)
    write_json(tmp_path / "more" / "compare.json", {"runs": topk[:1] + tail[:1] + [at_150]})
    assert "| 0.125, 0% |" in rates.equal_bits_small(tmp_path)


def test_a_further_run_never_raises_what_is_read_off_between_others():
    some = [(100, 0.4), (200, 0.2)]
    middle = math.sqrt(100 * 200)
    on_line = rates.at(rates.hull(some), middle)
    assert on_line == pytest.approx(math.sqrt(0.4 * 0.2))
    # a run above the line that joins its neighbours is left out, though no other beats it
    worse = [*some, (middle, 1.1 * on_line)]
    assert rates.hull(worse) == some
    assert rates.at(rates.frontier(worse), middle) == 1.1 * on_line
    better = [*some, (middle, 0.9 * on_line), (150, 0.9 * on_line), (250, 0.3)]
    assert rates.hull(better) == [some[0], (middle, 0.9 * on_line), some[1]]
    # several in a row
    bent = [(bits, 0.3 * (1 + (bits - 120) ** 2 / 1000)) for bits in (100, 110, 120)]
    assert rates.hull([*bent, (121, 0.1)]) == [bent[0], (121, 0.1)]
    assert rates.hull([]) == []


def test_searched_codes_stand_beside_those_of_the_encoder(tmp_path, monkeypatch):
    bae = [rate_run("bae", 0, bits, 30.0, {"0": kl}) for bits, kl in ((100, 0.4), (200, 0.2))]
    topk = [rate_run("topk", 0, bits, 30.0, {"0": kl}) for bits, kl in ((100, 0.5), (200, 0.3))]
    bae[0]["scores"]["search"] = {
        "points": [
            {"tree_support": bits, "l0": 20.0, "kl_by_value_bits": {"0": kl}}
            for bits, kl in ((100, 0.3), (200, 0.1))
        ]
    }
    topk[1]["scores"]["search"] = {
        "points": [{"tree_support": 80, "l0": 10.0, "kl_by_value_bits": {"2": 0.45, "12": 0.15}}]
    }
    write_json(tmp_path / "some" / "compare.json", {"runs": [*bae, *topk]})
    trained = copy.deepcopy(bae[0])
    for point in trained["scores"]["search"]["points"]:
        point |= {"steps": 50, "kl_by_value_bits": {"0": point["tree_support"] / 1000}}
    write_json(tmp_path / "trained" / "compare.json", {"runs": [trained]})
    monkeypatch.setattr(rates, "FAIR", {"a model": ("some", "trained")})
    monkeypatch.setattr(rates, "FAIR_BITS", (100, 200))
    # codes of encoders are held against codes of encoders, searched ones against searched ones
    _, _, *lines = rates.fair(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["a model", "BAE (sparse)", "encoder", "0.400", "0.200"],
        ["a model", "BAE (sparse)", "search", "0.300", "0.100"],
        ["a model", "BAE (sparse)", "search, trained on", "0.100", ""],
        ["a model", "TopK", "encoder", "0.500, +25%", "0.300, +50%"],
        ["a model", "TopK", "search", "0.450, +50%", "0.150, +50%"],
    ]
    # among repeats rivals stand that no search was made for, and all against searched codes
    again = rate_run("bae", 1, 100, 30.0, {"0": 0.6})
    write_json(tmp_path / "other" / "compare.json", {"runs": [*bae, again, topk[0]]})
    monkeypatch.setattr(rates, "REPEATS", {"a model": ("other",)})
    monkeypatch.setattr(rates, "REPEATS_BITS", (100,))
    assert rates.repeats(tmp_path).splitlines()[2:] == [
        "| a model | BAE (sparse) | encoder | 0.500 (0.400 to 0.600), +67% |",
        "| a model | BAE (sparse) | search | 0.300 |",
        "| a model | TopK | encoder | 0.500, +67% |",
    ]
    monkeypatch.setattr(rates, "FISHER", {"a model": ("other",)})
    monkeypatch.setattr(rates, "FISHER_BITS", (100,))
    assert rates.fisher(tmp_path) == rates.repeats(tmp_path)


def test_dense_and_dead_features_have_a_line_for_each_price(tmp_path, monkeypatch):
    def run(method, seed, weight, *points):
        return {
            "method": method, "seed": seed, "variant": {"entropy_weight": weight},
            "scores": {"search": {"points": points}},
        }  # fmt: skip

    def result(*points, other=()):
        return {"runs": [run("bae", 0, 1e-4, *points), run("topk", 0, 1e-4, {}), *other]}

    point = {"tree": 150.4, "fvu": 0.2, "kl_bits": 0.5, "dense_share": 0.03, "dead_share": 0.04}
    write_json(tmp_path / "free" / "compare.json", result(point))
    new = point | {"dense_bits": 12, "fitted_dead_share": 0.001, "dense_share": 0.02}
    # a further seed, and a weight that the other folder lacks, have no line
    others = [run("bae", 1, 1e-4, new), run("bae", 0, 2e-4, new)]
    dear = result(new, new | {"tree": 200.0}, new | {"steps": 1500}, other=others)
    write_json(tmp_path / "dear" / "compare.json", dear)
    monkeypatch.setattr(rates, "DENSE", {"a model": ("dear", "free")})
    assert rates.dense(tmp_path).splitlines()[2:] == [
        "| a model | 0 | no | 150 | 0.200 | 0.500 | 3.0% | 4.0% |  |",
        "| a model | 12 | no | 200 | 0.200 | 0.500 | 2.0% | 4.0% | 0.1% |",
        "| a model | 12 | no | 150 | 0.200 | 0.500 | 2.0% | 4.0% | 0.1% |",
        "| a model | 12 | 1,500 steps | 150 | 0.200 | 0.500 | 2.0% | 4.0% | 0.1% |",
    ]


def test_features_of_each_code_have_a_line(tmp_path, monkeypatch):
    def probes(first):
        return {"probe_1": first, "probe_2": first + 0.1, "probe_5": first + 0.2}

    def odd(mean):
        return {"mean": mean, "low": mean - 0.04, "high": mean + 0.04}

    bae = rate_run("bae", 0, 100, 30.0, {"0": 0.4}, entropy_weight=3e-4) | {"k": None}
    bae["scores"]["description"]["tree"] = 100.0
    bae["scores"] |= {"probing": probes(0.6), "intruder": odd(0.4)}
    bae["scores"]["search"] = {"points": [{"tree": 150.0}, {"tree": 130.2}, {"tree": 110.0}]}
    bae["scores"]["searched_features"] = {
        "points": [{"probing": probes(p), "intruder": odd(0.3)} for p in (0.57, 0.55, 0.53)]
    }
    topk = rate_run("topk", 0, 120, 8.0, {"3": 0.4}) | {"k": 8}
    topk["scores"]["description"]["tree"] = 144.4
    topk["scores"] |= {"probing": probes(0.5), "intruder": odd(0.5)}
    topk["scores"]["searched_features"] = {"points": []}  # as of a method without a search
    write_json(tmp_path / "binary" / "compare.json", {"runs": [bae]})
    write_json(tmp_path / "others" / "compare.json", {"runs": [topk]})
    monkeypatch.setattr(rates, "FEATURES", ("binary", "others"))
    assert rates.features(tmp_path).splitlines()[2:] == [
        "| BAE (sparse) a_e=0.0003 | encoder | 100 | 0.600 | 0.700 | 0.800 | 0.40 (0.36 to 0.44) |",
        "| BAE (sparse) a_e=0.0003 | search | 130 | 0.550 | 0.650 | 0.750 | 0.30 (0.26 to 0.34) |",
        "| TopK k=8 | encoder | 144 | 0.500 | 0.600 | 0.700 | 0.50 (0.46 to 0.54) |",
    ]


def test_a_search_that_gives_other_bits_gets_no_figure(monkeypatch):
    comparison = search.build(96, 24, 70, 4)
    assert comparison.case["changed"] > 0.5
    assert comparison.case["cost_after"] < comparison.case["cost_before"]
    row = timing.compare(comparison, seconds=0.0)
    assert set(row["sides"]) == {"encoder", "kernel", "torch"}
    assert all("seconds" in side for side in row["sides"].values())
    text = search.table({"rows": [row], "environment": environment()})
    assert "| 96, 24, 70 |" in text
    row["sides"]["kernel"].pop("seconds")

    def wrong(device, impl):
        found = registry.extras(impl, device.type)
        return dataclasses.replace(found, search=lambda *a: (a[4] ^ 1, None))

    monkeypatch.setattr("bae_fast.search.extras_of", wrong)
    with pytest.raises(exact.WrongResultError, match="bits differ from plain torch's"):
        timing.verify(comparison, "kernel")


def test_a_try_of_versions_replaces_the_older_try_of_the_same(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>'
    )
    counts = versions.counts(tmp_path / "report.xml")
    assert counts == {"passed": 5, "failed": 2, "skipped": 2}
    tried = {"python": "3.10.13", "torch": "2.11.0+cpu", "numpy": "2.2.6"}
    tried |= {"tests": ["kernels", "Triton"], "date": "2026-01-01"}
    path = tmp_path / "versions.json"
    for change in ({}, {"triton": "3.6.0"}, {"torch": "2.9.1"}, {"date": "2026-02-02"}):
        write_json(path, versions.kept(path, tried | counts | change))
    lines = versions.table(versions.kept(path, tried | counts | {"python": "3.9.1"})).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| 3.9.1", "2.11.0+cpu", "none"],
        ["| 3.10.13", "2.9.1", "none"],
        ["| 3.10.13", "2.11.0+cpu", "none"],
        ["| 3.10.13", "2.11.0+cpu", "3.6.0"],
    ]
    assert lines[4].endswith("| 2.2.6 | kernels, Triton | 5 | 2 | 2 | 2026-02-02 |")


def test_the_time_of_an_import_is_one_of_fresh_processes():
    (found,) = imports.seconds(1)
    assert found > 0


# -- language models ---------------------------------------------------------------------------


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    from tiny_lm import save_tiny_model

    from bae_fast.lm import load_language_model

    monkeypatch.setattr(models, "CONTEXT", 12)
    folder = save_tiny_model(tmp_path / "model", ["one", "two", "three", "four"])
    lm = load_language_model(str(folder), dtype="float32")
    lm.model.get_output_embeddings().weight.mul_(20)  # otherwise all tokens are about as likely
    return lm


def test_a_language_model_is_held_against_itself(tiny_model, tmp_path, monkeypatch):
    tokens = torch.randint(0, 5, (3, 12), generator=torch.Generator().manual_seed(0))
    found = models.check(tiny_model, "model.layers.0", tokens[:2], tmp_path)
    assert max(found[f"{name}_gap"] for name in ("rows", "head", "identity", "loss")) < 1e-5
    assert found["half_js_bits"] > 1e-4
    assert found["identity_js_bits"] < 1e-9
    timed = models.times(tiny_model, "model.layers.0", tokens)
    assert timed["n_judged"] == 30
    loads = {
        f"{step}{unit}": value
        for step, values in {"": (5.0, 4.0), "import_": (3.0, 2.0), "again_": (0.7, 0.6)}.items()
        for unit, value in zip(("seconds", "cpu_seconds"), values, strict=True)
    }
    row = {
        "model": "tiny", "dtype": "float32", "n_parameters": 1, "vocabulary": 5,
        "loads": [None, loads],
        "environment": environment(), **found, **timed,
    }  # fmt: skip
    line = "| tiny, float32 | 5 |  | 5 s (4) | 3 s (2) | 1 s (1) | 30 |"
    assert line in models.table({"rows": [row]})
    write_json(tmp_path / "models.json", {"rows": [row, row | {"model": "other"}]})
    new = {"environment": environment(), "rows": [row | {"n_judged": 7}]}
    merged = models.merged(tmp_path / "models.json", new)["rows"]
    assert [(r["model"], r["n_judged"]) for r in merged] == [("other", 30), ("tiny", 7)]

    # a splice that replaces nothing is found, whatever it says
    monkeypatch.setattr(models, "_Half", models._Identity)
    with pytest.raises(exact.WrongResultError, match="half_js is off by 1, over"):
        models.check(tiny_model, "model.layers.0", tokens[:2], tmp_path)
