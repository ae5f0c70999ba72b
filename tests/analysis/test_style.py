from analysis.style import marks


def test_marks_differ_as_long_as_there_are_enough_and_there_is_one_for_everybody():
    names = [f"method {i}" for i in range(60)]
    few = marks(names[:20])
    assert len(set(few.values())) == 20
    assert set(marks(names)) == set(names)


def test_series_have_the_colour_of_their_algorithm_whatever_else_they_quantize():
    beside = ("weights only", "inputs int8_token", "cache int4_kivi")
    series = [f"{algo}, {words}" for algo in ("rtn", "gptq", "awq", "hqq") for words in beside]
    found, plain = marks(series), marks(["rtn", "gptq", "awq", "hqq"])
    assert len(set(found.values())) == len(series)
    assert all(found[name].colour == plain[name.partition(",")[0]].colour for name in series)
    assert found["gptq, cache int4_kivi"] == plain["gptq"]


def test_every_colour_serves_before_one_repeats():
    found = marks(f"{algo}, weights only" for algo in ("gptq", "a", "b", "c", "d", "e"))
    assert len({mark.colour for mark in found.values()}) == 6
