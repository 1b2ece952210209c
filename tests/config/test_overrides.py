from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.overrides import Text, expand_sweep, format_value, parse_override
from fedtune.errors import ConfigError


def scalar(override: str) -> str:
    value = parse_override(override).value
    assert isinstance(value, Text)
    return value.text


@given(st.text())
def test_any_text_survives_being_written_and_read(text: str) -> None:
    value = parse_override(f"data.path={format_value(text)}").value
    assert isinstance(value, Text)
    assert value.text == text
    assert not value.is_null


@given(st.lists(st.text(), max_size=5))
def test_any_list_survives_being_written_and_read(items: list[str]) -> None:
    value = parse_override(f"data.labels={format_value(items)}").value
    assert isinstance(value, tuple)
    assert [item.text for item in value] == items


@given(st.lists(st.text(), min_size=1, max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_a_sweep_is_every_combination_once_and_the_last_key_runs_fastest(first: list[str], second: list[str]) -> None:
    overrides = [f"a={','.join(map(format_value, first))}", f"b={','.join(map(format_value, second))}"]
    runs = [[scalar(override) for override in run] for run in expand_sweep(overrides)]
    assert runs == [[one, other] for one in first for other in second]


@given(st.text(min_size=1), st.lists(st.text(), max_size=3))
def test_a_value_or_a_list_by_itself_is_one_run(text: str, items: list[str]) -> None:
    overrides = [f"a={format_value(text)}", f"b={format_value(items)}"]
    assert expand_sweep(overrides) == [overrides]


@pytest.mark.parametrize(
    "path",
    [
        "/tmp/my data (1)/x=1.csv",
        "../shared/a:b/c.csv",
        "/données/été/ε.csv",
        "/a'b/c\"d.csv",
        "C=1&x;y|z!*?#$@%^",
        "/a[1]/b{2}.csv",
        "~/x\\y.csv",
    ],
)
def test_paths_need_no_quoting_beyond_the_shells(path: str) -> None:
    assert scalar(f"data.path={path}") == path


def test_quotes_keep_a_comma_in_a_value() -> None:
    assert expand_sweep(['data.path="/a b/c,d.csv"']) == [['data.path="/a b/c,d.csv"']]
    assert scalar("data.path='/a b/c,d.csv'") == "/a b/c,d.csv"
    assert expand_sweep(["data.path=/a b/c,d.csv"]) == [["data.path=/a b/c"], ["data.path=d.csv"]]


def test_lists_and_quoted_items_can_be_swept() -> None:
    runs = expand_sweep(["lora.targets=[q_proj,v_proj], all-linear,'x,y'"])
    assert runs == [["lora.targets=[q_proj,v_proj]"], ["lora.targets=all-linear"], ["lora.targets='x,y'"]]


@pytest.mark.parametrize(("text", "null"), [("null", True), ("None", True), ("'none'", False), ("nil", False)])
def test_only_the_plain_words_null_and_none_unset(text: str, null: bool) -> None:
    value = parse_override(f"data.text={text}").value
    assert isinstance(value, Text)
    assert value.is_null is null


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("privacy.epsilon", "bad-override"),
        ("=3", "bad-override"),
        ("data.path=", "bad-override"),
        ("privacy.epsilon=3,,8", "bad-override"),
        ("privacy.epsilon=3,", "bad-override"),
        ("data.labels=[a,b", "bad-override"),
        ("data.labels=[a,[b]]", "bad-override"),
        ("data.labels=[a]b", "bad-override"),
        ("data.labels=[a,]", "bad-override"),
        ('data.path="a', "bad-override"),
        ('data.path="a"b', "bad-override"),
        ("+privacy.x=1", "refused"),
        ("++privacy.x=1", "refused"),
        ("~privacy", "refused"),
        ("~privacy.mode=dp", "refused"),
        ("privacy.epsilon=3,8", "sweep"),
    ],
)
def test_a_malformed_override_is_an_error_that_quotes_it(override: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(override)
    assert caught.value.code == f"config.{code}"
    assert override in caught.value.message
    assert caught.value.hint


@given(st.text(st.sampled_from("a=,[]'\"\\ \n+~$"), max_size=12))
def test_any_argument_is_read_or_refused_and_never_crashes(override: str) -> None:
    try:
        for (item,) in expand_sweep([override]):
            parse_override(item)
    except ConfigError:
        return
