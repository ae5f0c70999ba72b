from analysis.style import marks


def test_marks_differ_as_long_as_there_are_enough_and_there_is_one_for_everybody():
    names = [f"method {i}" for i in range(60)]
    few = marks(names[:20])
    assert len(set(few.values())) == 20
    assert set(marks(names)) == set(names)
