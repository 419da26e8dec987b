"""gated_residual against what a user would pick instead."""


def test_gated_residual(time_op):
    time_op("gated_residual")
