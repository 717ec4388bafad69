import pytest

from megatron_cpgd.config.schema import ExactMatchReward, FormatReward, MathReward, PythonReward
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rewards.build import build_reward, reward_names

MATH = MathReward(type="math")


def score(config, response, answer=None):
    return build_reward(config)(response, answer, {})


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"So it is \boxed{42}.", "42", 1.0),
        (r"So it is \boxed{42}.", "43", 0.0),
        (r"so \boxed{0.5}", "1/2", 1.0),
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so \boxed{\frac12}", r"\frac{1}{2}", 1.0),
        (r"so \boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
        (r"so \boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"so \boxed{1000}", "1,000", 1.0),
        (r"so \boxed{x = 7}", "7", 1.0),
        (r"so \boxed{7}", r"Thus \boxed{7}", 1.0),
        ("first 12, then 42", "42", 1.0),  # no box: the last number
        (r"5 apples, \boxed{6}, or 7", "6", 1.0),  # a box beats a later number
        (r"\boxed{6}, so the final answer is $7$", "6", 1.0),
        (r"\boxed{3}, no: \boxed{42}", "42", 1.0),  # the last box is the answer
        (r"\boxed{42}, no: \boxed{3}", "42", 0.0),
        (r"42 or \boxed{", "42", 0.0),  # cut in the middle of the answer
        ("", "42", 0.0),
        ("I do not know.", "42", 0.0),
    ],
)
def test_math_compares_the_final_answer(response, answer, expected):
    assert score(MATH, response, answer) == expected


@pytest.mark.parametrize("answer", ["", " "])
def test_math_answer_that_is_no_mathematics_is_an_error(answer):
    with pytest.raises(ValueError, match="math-verify"):
        score(MATH, r"\boxed{1}", answer)


@pytest.mark.parametrize("config", [MATH, ExactMatchReward(type="exact_match")])
def test_missing_answer_is_an_error(config):
    with pytest.raises(ValueError, match=r"data\.answer_key"):
        score(config, "1", None)


@pytest.mark.parametrize(
    ("response", "answer", "after", "expected"),
    [
        (" yes\n", "yes", None, 1.0),
        ("yes.", "yes", None, 0.0),
        ("", "", None, 1.0),
        ("because #### 7", "7", "####", 1.0),
        ("#### 6 #### 7", "7", "####", 1.0),  # the last occurrence counts
        ("#### 7 #### 6", "7", "####", 0.0),
        ("7", "7", "####", 0.0),  # marker missing
    ],
)
def test_exact_match(response, answer, after, expected):
    assert score(ExactMatchReward(type="exact_match", after=after), response, answer) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a\nb</think>c", 1.0),  # the dot matches line ends
        ("x<think>a</think>c", 0.0),  # the whole response must match
        ("<think>a", 0.0),
    ],
)
def test_format_matches_the_whole_response(response, expected):
    config = FormatReward(type="format", pattern="<think>.*</think>.*")
    assert score(config, response) == expected


def test_names_are_types_or_function_names_and_unique():
    configs = [
        MATH,
        PythonReward(type="python", path="a.b.brevity"),
        PythonReward(type="python", path="c.brevity"),
        FormatReward(type="format", pattern="x"),
        FormatReward(type="format", pattern="y"),
    ]
    assert reward_names(configs) == ["math", "brevity", "brevity_2", "format", "format_2"]


def test_pattern_that_does_not_compile_is_a_config_error():
    with pytest.raises(ConfigError, match=r"pattern '\(' is not a regular expression"):
        build_reward(FormatReward(type="format", pattern="("))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards_ok.py").write_text(
        "LIMIT = 3\n"
        "def length(response, answer, fields):\n    return len(response) * fields['scale']\n"
        "def two(response, answer):\n    return 0.0\n"
    )
    (tmp_path / "user_rewards_broken.py").write_text("import no_such_dependency\n")
    (tmp_path / "user_rewards_syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_python_path_leads_to_the_function(user_module):
    function = build_reward(PythonReward(type="python", path="user_rewards_ok.length"))
    assert function("abc", None, {"scale": 2.0}) == 6.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "expected package.module.function"),
        ("no_such_module.f", "no module 'no_such_module'"),
        ("json.no_such_module.f", "no module 'json.no_such_module'"),
        ("user_rewards_ok.width", "module 'user_rewards_ok' has no attribute 'width'"),
        ("user_rewards_ok.LIMIT", "got int"),
        ("user_rewards_ok.two", "too many positional arguments"),
        ("user_rewards_broken.f", "'user_rewards_broken' failed.*no_such_dependency"),
        ("user_rewards_syntax.f", "SyntaxError"),
    ],
)
def test_wrong_python_path_says_what_is_missing(user_module, path, message):
    with pytest.raises(ConfigError, match=message):
        build_reward(PythonReward(type="python", path=path))
