"""The summary against numbers made by hand."""

from __future__ import annotations

from embcache.report.page.collect import Task
from embcache.report.page.words import headline, p_words, sentences
from tests.report.page.build import make_choice, make_rival

TASK = Task("pneumonia", "", "auc", ("no", "yes"), {})


def _text(*rivals: object) -> str:
    return " ".join(sentences(TASK, make_choice(*rivals)))  # type: ignore[arg-type]


def test_the_winner_is_that_of_validation_and_a_higher_test_score_chooses_nothing() -> None:
    text = _text(
        make_rival("first", 0.95, 0.90),
        make_rival("second", 0.94, 0.93, (0.03, 0.01, 0.05), 0.001),
        make_rival("third", 0.80, 0.70, (-0.2, -0.25, -0.15), 0.0005),
    )
    assert text.startswith("first has the best validation AUC of 3 models (0.950); its test AUC is 0.900 ± 0.010")
    assert "95 % interval 0.880 to 0.920" in text
    assert "Next on validation is second (0.940). On the test set it reaches 0.930 ± 0.010" in text
    assert "its AUC is 0.0300 higher (interval of the difference +0.0100 to +0.0500, p = 0.001), beyond" in text
    assert "ahead of 1 of the 2 other models" in text
    assert "and behind second" in text
    assert "A higher test AUC was reached by second (0.930): not chosen" in text


def test_a_difference_within_the_interval_is_told_as_such() -> None:
    text = _text(make_rival("first", 0.95, 0.90), make_rival("second", 0.94, 0.89, (-0.01, -0.03, 0.01), 0.4))
    assert "its AUC is 0.0100 lower" in text
    assert "within the interval: this test set does not tell them apart" in text
    assert "A higher test" not in text
    assert "After correction" not in text  # one other model: the sentence before has said it


def test_a_difference_that_correction_takes_away_is_told() -> None:
    text = _text(make_rival("first", 0.95, 0.90), make_rival("second", 0.94, 0.88, (-0.02, -0.04, -0.001), 0.12))
    assert "beyond the interval, though not after correction" in text


def test_a_fused_winner_is_put_beside_the_best_single_backbone() -> None:
    text = _text(
        make_rival("fused", 0.95, 0.90, backbones=("a", "b")),
        make_rival("fused too", 0.94, 0.90, (0.0, -0.01, 0.01), 1.0, backbones=("a", "b")),
        make_rival("alone", 0.93, 0.85, (-0.05, -0.08, -0.02), 0.002),
    )
    assert "Of single backbones, alone is best on validation. On the test set it reaches 0.850" in text


def test_a_single_model_wins_against_nobody() -> None:
    text = _text(make_rival("only", 0.95, 0.90))
    assert text.startswith("only has the only validation AUC (0.950)")
    assert "Next" not in text


def test_none_differs() -> None:
    same = [make_rival(name, 0.9 - k / 100, 0.9, (0.0, -0.01, 0.01), 1.0) for k, name in enumerate("bc")]
    assert "none of the 2 other models differs" in _text(make_rival("a", 0.95, 0.90), *same)


def test_headlines() -> None:
    small = make_choice(make_rival("a", 0.9, 0.8), subset="S", n_train=50)
    large = make_choice(make_rival("b", 0.9, 0.9), subset="F", n_train=4000)
    told = headline(TASK, [small, large])
    assert "a at S; b at F" in told
    assert "from 0.800 ± 0.010 with 50 training labels to 0.900 ± 0.010 with 4,000" in told
    assert "a is best on validation at every size" in headline(TASK, [small, small])
    assert "a is best on validation at S (50 training labels; 150 with validation)" in headline(TASK, [small])
    assert headline(TASK, []) == "pneumonia: no results that can be ranked."


def test_small_p_are_bounded() -> None:
    assert (p_words(0.0004), p_words(0.0125)) == ("< 0.001", "= 0.013")
