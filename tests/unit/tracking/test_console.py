import math

from megatron_cpgd.tracking.console import step_line, summary_table

METRICS = {
    "reward/mean": 0.25,
    "reward/accuracy": 0.5,
    "rollout/response_tokens_mean": 812.4,
    "policy/entropy": 0.31,
    "policy/clip_frac_low": 0.001,
    "policy/clip_frac_high": 0.002,
    "policy/drift": 1.5e-5,
    "policy/grad_norm": 0.8,
    "rollout/logprob_abs_diff_mean": 2e-3,
    "time/total_s": 41.23,
}


def test_a_step_is_one_line_with_every_number():
    line = step_line(7, 200, METRICS)
    assert " ".join(line.split()) == (
        "step 7/200 reward +0.250 acc 0.500 len 812 entropy 0.310 clip 0.0030 drift 1.50e-05 "
        "grad 0.800 |dlogp| 2.0e-03 s 41.2"
    )  # clip 0.001 + 0.002


def test_what_is_wrong_stands_at_the_end_of_the_line():
    line = step_line(7, 200, METRICS | {"stability/findings": ["reward_drop", "repetition"]})
    assert line == f"{step_line(7, 200, METRICS)}  ! reward_drop, repetition"


def test_lines_of_different_steps_are_aligned():
    other = METRICS | {"reward/mean": -0.125, "policy/grad_norm": math.nan}
    del other["policy/entropy"]
    lines = [step_line(7, 200, METRICS), step_line(123, 200, other)]
    assert len(lines[0]) == len(lines[1])
    assert "entropy       -" in lines[1]
    assert "grad     nan" in lines[1]


def test_the_summary_shows_first_last_lowest_and_highest():
    rows = [{"step": s, "reward/mean": float(s), "time/total_s": 6.0} for s in range(20)]
    rows[3]["eval/aime/accuracy"] = 0.25
    lines = [line.split() for line in summary_table(rows).splitlines()]
    assert lines[0] == ["20", "steps,", "2.0", "min"]
    assert lines[3] == ["eval/aime/accuracy", "0.25", "0.25", "0.25", "0.25", "-"]
    # last 10 rows: 10..19, mean 14.5
    assert lines[4] == ["reward/mean", "0", "19", "0", "19", "14.5"]


def test_the_columns_of_the_summary_are_aligned():
    lines = summary_table([{"step": 0, **METRICS}]).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
