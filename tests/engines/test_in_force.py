"""What stays known, and for how long."""

import pytest

from server.engines.base import EngineUnavailableError
from server.engines.in_force import InForce


def known(in_force: InForce[str]) -> set[str]:
    return {digest for digest in "abcd" if in_force.find(digest)}


def test_the_one_in_force_and_the_one_before_are_known() -> None:
    in_force = InForce("a", "A")
    for digest in "bc":
        in_force.put(digest, digest.upper())
    assert known(in_force) == {"b", "c"} and in_force.current.value == "C"
    with pytest.raises(EngineUnavailableError, match=r"mask a was replaced.*in force is c"):
        in_force.held("a").__enter__()


def test_what_is_held_stays_known_until_it_is_let_go() -> None:
    in_force = InForce("a", "A")
    with in_force.held(None) as first, in_force.held("a") as again:
        for digest in "bc":
            in_force.put(digest, digest.upper())
        assert first is again and first.value == "A" and known(in_force) == {"a", "b", "c"}
    assert known(in_force) == {"b", "c"}


def test_what_comes_back_has_its_number_and_what_was_forgotten_a_new_one() -> None:
    in_force = InForce("a", "A")
    in_force.put("b", "B")
    in_force.put_back("a")
    assert in_force.current.number == 0
    in_force.put_back("a")
    assert known(in_force) == {"a", "b"}, "the same again is no swap"
    in_force.put("c", "C")
    in_force.put("b", "B")
    assert in_force.current.number == 3
