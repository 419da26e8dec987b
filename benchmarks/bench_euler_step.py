"""euler_step against what a user would pick instead."""


def test_euler_step(time_op):
    time_op("euler_step")
