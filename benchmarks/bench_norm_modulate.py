"""norm_modulate against what a user would pick instead."""


def test_norm_modulate(time_op):
    time_op("norm_modulate")
