"""gated_residual_norm_modulate against what a user would pick instead."""


def test_gated_residual_norm_modulate(time_op):
    time_op("gated_residual_norm_modulate")
