"""Sentences against numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from html import unescape
from typing import Any

from embcache.probe.summary import training_notes
from embcache.report.collect import Rival, Task
from embcache.report.page import make_environment
from embcache.report.sections import NEW_MODEL, change_words, headline
from embcache.results.compare import Difference
from tests.report.build import make_choice, make_rival

TASK = Task("pneumonia", "", "auc", ("no", "yes"), {})


def _text(*rivals: Rival, task: Task = TASK) -> str:
    choice = make_choice(*rivals)
    macros: Any = make_environment().get_template("macros.html.j2").module
    lines = macros.sentences(task, choice, training_notes(choice.chosen.result)).split("</p>")
    return " ".join(unescape(line).split("<p>")[-1].replace("\xa0", " ") for line in lines).strip()


def test_the_winner_is_that_of_validation_and_a_higher_test_score_chooses_nothing() -> None:
    text = _text(
        make_rival("first", 0.95, 0.90),
        make_rival("second", 0.94, 0.93, (0.03, 0.01, 0.05), 0.001),
        make_rival("third", 0.80, 0.70, (-0.2, -0.25, -0.15), 0.0005),
    )
    assert text.startswith("first is the best of 3 models on validation (AUC 0.950).")
    assert f"On the test set it reaches 0.900 ± 0.010 (0.880 to 0.920: {NEW_MODEL})." in text
    assert "It is better than third (Holm-corrected p < 0.05)." in text
    assert "second scored higher on the test set (Holm-corrected p < 0.05), which plays no part in the choice." in text


def test_where_no_difference_was_shown_the_detectable_one_stands_beside_it() -> None:
    text = _text(make_rival("first", 0.95, 0.90), make_rival("second", 0.94, 0.89, (-0.01, -0.03, 0.01), 0.4))
    assert (
        "No difference from second was shown: −0.010 (−0.030 to +0.010); one of 0.030 or more would have been" in text
    )
    assert "better" not in text


def test_folds_that_collapse_are_named_beside_the_result_and_accuracy_has_its_baseline() -> None:
    rival = make_rival("only", 0.95, 0.5)
    folds = [replace(f, metrics={"predicted": [98, 2] if f.fold == 1 else [50, 50]}) for f in rival.result.folds]
    result = replace(rival.result, folds=tuple(folds), test_counts=(40, 60), class_names=("no", "yes"))
    collapsed = replace(rival, tested=replace(rival.tested, result=result))
    text = _text(collapsed, task=replace(TASK, metric="accuracy"))
    assert "In this model, fold 1 predicts 'no' for 98 of 100 test images; 40 of them are 'no'." in text
    assert "Always predicting 'yes' has an accuracy of 0.600." in text


def test_the_headline_is_the_advice_or_what_the_only_model_reaches() -> None:
    choice = make_choice(make_rival("a", 0.9, 0.8), make_rival("b", 0.8, 0.7, (-0.1, -0.2, -0.05), 0.001))
    told = headline(TASK, [choice], choice.advice)
    assert told == f"pneumonia: {choice.advice.text}"
    assert "Take a" in told
    alone = headline(TASK, [make_choice(make_rival("a", 0.9, 0.8))], None)
    assert alone == f"pneumonia: a reaches a test AUC of 0.800 with 50 training labels (0.780 to 0.820: {NEW_MODEL})."
    assert headline(TASK, [], None) == "pneumonia: no results that can be ranked."


def test_changes_between_sizes_are_judged_by_their_interval() -> None:
    def change(low: float, high: float) -> Difference:
        return Difference((low + high) / 2, (low, high), 0.5, 0.1, None, True)

    assert change_words(change(0.01, 0.05), False) == "+0.030 (+0.010 to +0.050): better"
    assert change_words(change(-0.01, 0.03), False).endswith(": no gain shown")
    assert change_words(change(-0.05, -0.01), False).endswith(": worse")
    assert change_words(change(-0.05, -0.01), True).endswith(": better")  # of a loss
    assert change_words(None, False) == ""
