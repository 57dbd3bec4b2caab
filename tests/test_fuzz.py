"""The fuzzer itself: a little of it for each decoder, and that it finds what is planted. `make fuzz` runs it longer."""

from __future__ import annotations

import pytest

from fastref.errors import ProtocolError
from tests.fuzz.decoders import TARGETS
from tests.fuzz.fuzzer import Fuzzer, LastInput, Target


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_any_input_well(name, tmp_path):
    with LastInput(tmp_path / "last") as last:
        fuzzer = Fuzzer(TARGETS[name], 1, last)
        fuzzer.run_through(5000)
    assert 0 < fuzzer.taken < fuzzer.inputs


def test_a_planted_mistake_is_found_and_its_input_kept(tmp_path):
    def read(data):
        if len(data) > 3 and data[3] == 255:
            raise IndexError("planted")
        if data[:1] != b"a":
            raise ProtocolError("no")

    with pytest.raises(IndexError, match="planted"), LastInput(tmp_path / "last") as last:
        Fuzzer(Target(read, [b"abcdef"]), 1, last).run(60)
    assert (tmp_path / "last").read_bytes()[3] == 255
