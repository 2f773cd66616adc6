"""Reliability weights and filters: the known truth is recovered, and every removed judgment is counted."""

import random

import pytest
from datasets import Dataset

from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.quality.refine import filter_comparisons, weigh_by_reliability
from hf_rlhf_ext.quality.report import quality_report

ACCURACY = {"good": 0.95, "fair": 0.8, "careless": 0.5, "contrary": 0.1}


def simulated(n=400, seed=0):
    """Rows whose first completion is better or worse at random, judged by four people of known accuracy."""
    rng, truths, rows = random.Random(seed), [], []
    for k in range(n):
        truth = rng.random() < 0.5
        votes = []
        for name, accuracy in ACCURACY.items():
            label = float(truth == (rng.random() < accuracy))
            flip = rng.random() < 0.5  # shown in the opposite order
            votes.append({"annotator": name, "pair": [1, 0] if flip else [0, 1], "label": 1 - label if flip else label})
        first = [v["label"] if v["pair"] == [0, 1] else 1 - v["label"] for v in votes]
        pairs = {"pairs": [[0, 1]], "targets": [sum(first) / len(first)], "votes": votes, "row": k}
        rows.append({"prompt": f"p{k}", "completions": ["a", "b"], **pairs})
        truths.append(truth)
    return Dataset.from_list(rows), truths


def test_dawid_skene_finds_who_is_reliable_and_beats_the_mean_vote():
    dataset, truths = simulated()
    weighed, accuracies = weigh_by_reliability(dataset)
    for name, accuracy in ACCURACY.items():
        assert accuracies[name] == pytest.approx(accuracy, abs=0.08)

    def right(rows):
        return sum((row["targets"][0] > 0.5) == truth for row, truth in zip(rows, truths, strict=True)) / len(truths)

    assert right(weighed) > 0.93 > right(dataset) + 0.05
    assert all(0 <= row["targets"][0] <= 1 for row in weighed)


def test_pairs_without_votes_keep_their_target_and_no_votes_at_all_is_one_line():
    dataset, _ = simulated(20)
    silent = {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [0.3], "votes": None, "row": 20}
    weighed, _ = weigh_by_reliability(Dataset.from_list([*dataset, silent]))
    assert weighed[20]["targets"] == [0.3]
    with pytest.raises(PreferenceDataError, match="no row has `votes`"):
        weigh_by_reliability(Dataset.from_list([silent]))


ROWS = [
    {"completions": ["a", "b", "c d e f"], "pairs": [[0, 1], [1, 0], [0, 2]], "targets": [1.0, 1.0, 0.0]},
    {"completions": ["a", "b"], "pairs": [[0, 1], [0, 1]], "targets": [1.0, 0.0]},
    {"completions": ["a", "b"], "pairs": [[0, 1], [1, 0]], "targets": [1.0, 0.0]},  # the same answer twice
]
ROWS = [{"prompt": str(k), "row": 10 + k, **row} for k, row in enumerate(ROWS)]


def test_contradictions_are_dropped_and_weights_are_shared_anew():
    kept, report = filter_comparisons(Dataset.from_list(ROWS), drop_contradictions=True)
    assert kept["pairs"][:] == [[[0, 1]], [[0, 1], [1, 0]]] and kept["weights"][:] == [[1.0], [0.5, 0.5]]
    assert kept["completions"][:] == [["a", "c d e f"], ["a", "b"]]  # nothing is left to compare "b" with
    assert report.dropped == {"contradictory judgments": [11]} and (report.rows_in, report.kept) == (3, 2)
    assert report.flagged == {"lost judgments: contradictory judgments": [10]}


def test_length_gap_is_in_words():
    kept, report = filter_comparisons(Dataset.from_list(ROWS), max_length_gap=2)
    assert kept[0]["pairs"] == [[0, 1], [1, 0]] and report.kept == 3
    assert report.flagged == {"lost judgments: sides differ by more than 2 words": [10]}


def test_agreement_counts_the_votes_of_a_pair():
    def row(k, labels):
        votes = [{"annotator": str(n), "pair": [0, 1], "label": label} for n, label in enumerate(labels)]
        return {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [1.0], "votes": votes, "row": k}

    rows = [row(0, [1.0, 1.0, 1.0]), row(1, [1.0, 1.0, 0.0]), row(2, [1.0, 0.5, 0.0])]
    kept, report = filter_comparisons(Dataset.from_list(rows), min_agreement=0.6)
    assert kept["row"][:] == [0, 1] and report.dropped == {"agreement under 0.6": [2]}
    with pytest.raises(PreferenceDataError, match="loosen"):
        filter_comparisons(Dataset.from_list(rows[2:]), min_agreement=0.6)
    with pytest.raises(PreferenceDataError, match="`votes`: min_agreement .* leave it out"):
        filter_comparisons(Dataset.from_list(ROWS), min_agreement=0.6)


@pytest.mark.parametrize("labels, share", [([1.0, 0.75, 0.6, 0.0], 0.75), ([0.25, 0.0, 0.5, 0.5, 0.4], 0.6)])
def test_graded_votes_agree_on_the_winner(labels, share):
    votes = [{"annotator": str(n), "pair": [0, 1], "label": label} for n, label in enumerate(labels)]
    row = {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [1.0], "votes": votes}
    rows = Dataset.from_list([row, row | {"votes": votes[:1]}])
    assert len(filter_comparisons(rows, min_agreement=share)[0]) == 2
    assert len(filter_comparisons(rows, min_agreement=share + 0.01)[0]) == 1
    whole = Dataset.from_list(
        [row | {"votes": [v | {"label": round(v["label"]) if v["label"] != 0.5 else 0.5} for v in votes]}]
    )
    assert weigh_by_reliability(rows.select([0]))[0]["targets"][:] == weigh_by_reliability(whole)[0]["targets"][:]


def test_a_removed_pair_takes_its_votes_completions_weights_and_flags_along():
    def vote(name, pair, label=1.0):
        return {"annotator": name, "pair": pair, "label": label}

    row = {
        "prompt": "p",
        "completions": ["", "one", "a b c d", "two"],
        "pairs": [[3, 1], [0, 2], [1, 3]],
        "targets": [1.0, 0.0, 0.2],
        "margins": [1.0, -2.0, -3.0],
        "weights": [0.5, 0.25, 0.25],
        "votes": [vote("u", [2, 0]), vote("u", [1, 3], 0.0), vote("v", [0, 3])],  # the row does not compare 0 and 3
        "flags": ["duplicated_row", "empty_completion"],
        "row": 4,
    }
    kept, report = filter_comparisons(Dataset.from_list([row]), max_length_gap=3)
    assert report.flagged == {"lost judgments: sides differ by more than 3 words": [4]}
    found = kept[0]
    assert found["completions"] == ["one", "two"] and found["pairs"] == [[1, 0], [0, 1]]
    assert (found["targets"], found["margins"]) == ([1.0, 0.2], [1.0, -3.0])
    assert found["weights"] == [0.5, 0.25]  # weights of the source are kept; default weights are recomputed
    assert [(v["annotator"], v["pair"], v["label"]) for v in found["votes"]] == [("u", [0, 1], 0.0)]
    assert found["flags"] == ["duplicated_row"]
    assert quality_report(kept).metrics["empty_completions"] == 0  # the filtered row is still a comparison row
    again, _ = filter_comparisons(Dataset.from_list([row | {"weights": [1 / 3] * 3}]), max_length_gap=3)
    assert again[0]["weights"] == [0.5, 0.5]


def test_a_tie_of_a_contradicted_pair_goes_too():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "pairs": [[0, 1], [1, 0], [1, 0], [2, 1]], "row": 0}
    kept, _ = filter_comparisons(Dataset.from_list([row | {"targets": [1.0, 1.0, 0.5, 1.0]}]), drop_contradictions=True)
    assert kept[0]["completions"] == ["b", "c"] and kept[0]["pairs"] == [[1, 0]]
