"""swiglu against what a user would pick instead."""


def test_swiglu(time_op):
    time_op("swiglu")
