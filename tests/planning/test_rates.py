from pipeline.planning import rates


def test_every_rate_says_where_it_comes_from() -> None:
    table = {name: value for name, value in vars(rates).items() if isinstance(value, rates.Rate)}
    assert table["STEP_OVER_ENCODER"] == (1.41, "measured", table["STEP_OVER_ENCODER"].meaning)
    assert all(rate.value > 0 and rate.meaning for rate in table.values())
    assert {rate.basis for rate in table.values()} <= {"measured", "assumed", "data sheet"}
