"""`make mutation` finds every guard where it says it is, and every test that it names."""

import re

import pytest

from tests.mutation import MUTATIONS, ROOT, Mutation, mutated

pytestmark = pytest.mark.long


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.guard)
def test_every_guard_is_there_to_be_taken_out_and_every_test_to_notice(mutation: Mutation) -> None:
    assert mutated(mutation) != (ROOT / mutation.file).read_text()
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        function = re.escape(name.partition("[")[0])
        assert re.search(rf"^(?:async )?def {function}\(", (ROOT / file).read_text(), re.MULTILINE), test
