"""rope against what a user would pick instead."""


def test_rope(time_op):
    time_op("rope")
