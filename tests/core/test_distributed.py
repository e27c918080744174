"""The environment variables of torchrun, and ranks that end."""

import pytest

from bertlite.core.distributed import check_environment, get_rank, get_world_size
from bertlite.core.errors import UserError


def set_environment(monkeypatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc"}, "RANK is 'abc', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2; start the ranks by torchrun"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', not a number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set; start the ranks by"),
    ],
)
def test_variables_that_torchrun_did_not_set_are_named(monkeypatch, variables, message):
    set_environment(monkeypatch, **variables)
    with pytest.raises(UserError, match=message):
        check_environment()


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [({}, (0, 1)), ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
     ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, (3, 4))],
)  # fmt: skip
def test_ranks_are_those_of_torchrun(monkeypatch, variables, ranks):
    set_environment(monkeypatch, **variables)
    check_environment()
    assert (get_rank(), get_world_size()) == ranks


def test_a_command_with_wrong_variables_ends_in_one_line(monkeypatch, bertlite):
    set_environment(monkeypatch, RANK="abc")
    code, _, errors = bertlite("fill", "anything", "a [MASK]")
    assert code == 2 and errors.count("\n") == 1 and "RANK is 'abc'" in errors
