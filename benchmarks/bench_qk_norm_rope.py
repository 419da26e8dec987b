"""qk_norm_rope against what a user would pick instead."""


def test_qk_norm_rope(time_op):
    time_op("qk_norm_rope")
