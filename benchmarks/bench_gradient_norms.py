"""gradient_norms against what a user would pick instead."""


def test_gradient_norms(time_op):
    time_op("gradient_norms")
