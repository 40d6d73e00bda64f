"""Generators depend on their arguments only."""

from spidr.data.seeds import Draw, generator


def test_every_argument_counts() -> None:
    arguments = [(0, Draw.ORDER, 0), (1, Draw.ORDER, 0), (0, Draw.BATCH, 0), (0, Draw.ORDER, 1), (0, Draw.BATCH, 0, 1)]
    first = [generator(*each).random() for each in arguments]
    assert len(set(first)) == len(arguments)
    assert [generator(*each).random() for each in arguments] == first
