"""dmd_direction against what a user would pick instead."""


def test_dmd_direction(time_op):
    time_op("dmd_direction")
