"""The page of promises: each has a test, and the page is what its script makes of the committed results."""

import pytest

import reliability
from promises import PROMISES, Promise

ALL = [promise for promises in PROMISES.values() for promise in promises]


def test_every_promise_has_a_name_of_its_own():
    assert len({promise.name for promise in ALL}) == len(ALL)


@pytest.mark.parametrize("promise", ALL, ids=lambda promise: promise.name)
def test_every_promise_has_a_test(promise):
    assert reliability.declared().get(promise.name)


def test_the_page_is_what_the_results_say():
    assert reliability.PAGE.read_text() == reliability.page(), "python tests/reliability.py page"


@pytest.mark.parametrize("gpu", reliability.OTHER_GPUS)
def test_nothing_failed_on_other_gpus(gpu):
    tests = reliability.merged(gpu).values()
    assert sum(test["passed"] for test in tests) > 0 and sum(test["failed"] for test in tests) == 0


def test_every_cell_says_something_and_nothing_failed():
    """A column without any results is not run yet: on a GPU, that takes one."""
    for column in reliability.COLUMNS:
        tests = reliability.merged(column)
        for promise in ALL:
            cell = reliability.cell(promise, column, tests)
            assert cell.startswith(("not applicable: ", "not run: ")) or " passed" in cell or not tests, promise
            assert "**" not in cell, promise


REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="test_b[1-2]"><properties>
<property name="promise" value="opcheck"/><property name="promise" value="export"/></properties></testcase>
<testcase classname="tests.gpu.test_a" name="test_b[3-4]"><properties><property name="promise" value="opcheck"/>
<property name="examples" value="200"/></properties><failure message="no"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_c"><properties><property name="promise" value="export"/></properties>
<skipped message="needs two GPUs"/></testcase>
<testcase classname="tests.test_d" name="test_e"/>
</testsuite></testsuites>"""


def test_a_report_is_read_by_test_function():
    tests = reliability.tests_of(REPORT)
    assert tests == {
        "tests/gpu/test_a.py::test_b": {
            "passed": 1,
            "failed": 1,
            "skipped": 0,
            "promises": ["export", "opcheck"],
            "examples": 200,
        },
        "tests/gpu/test_a.py::test_c": {
            "passed": 0,
            "failed": 0,
            "skipped": 1,
            "promises": ["export"],
            "reason": "needs two GPUs",
        },
    }
    assert reliability.cell(Promise("opcheck", ""), "cpu", tests) == "**1 passed, 1 failed**"
    only_skipped = {"test_c": tests["tests/gpu/test_a.py::test_c"]}
    assert reliability.cell(Promise("export", ""), "cpu", only_skipped) == "not run: needs two GPUs"
    assert reliability.cell(Promise("other", "", cpu="no CPU"), "cpu", tests) == "not applicable: no CPU"
