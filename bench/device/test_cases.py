"""The cases in their order."""

from bench.device import cases


def test_every_case_has_a_name_of_its_own():
    names = [cases.name_of(c) for c in cases.cases(cases.FULL, ["triton", "torch"], "cuda")]
    assert len(set(names)) == len(names)
