"""two_step_split and inject_gradient, its backward as a function, against what a user would pick instead."""


def test_two_step_split(time_op):
    time_op("two_step_split")


def test_inject_gradient(time_op):
    time_op("inject_gradient")
