"""The quality report: metrics against other libraries and brute force, and a page that shows them."""

import importlib.util
import json
import random
import re
import time
from itertools import combinations

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats import inter_rater

from hf_rlhf_ext.data.schema import LoadReport, PreferenceDataError, as_dataset, group_by_prompt
from hf_rlhf_ext.quality.duplicates import PromptIndex, near_duplicates, question_of, words_of
from hf_rlhf_ext.quality.page import write_quality_page
from hf_rlhf_ext.quality.report import MEANINGS, quality_report
from hf_rlhf_ext.quality.reward_check import check_reward
from hf_rlhf_ext.readers.formats import load_comparisons, to_comparisons


def report_of(rows, heldout=None, **options):
    rows = [{"prompt": f"what is number {k} good for today", **row} for k, row in enumerate(rows)]
    return quality_report(to_comparisons(Dataset.from_list(rows))[0], heldout, **options)


def pair(first="one", second="two two", target=1.0, **more):
    return {"completions": [first, second], "pairs": [[0, 1]], "targets": [target], **more}


def test_pandalm_agreement_is_that_of_other_libraries(shared_data):
    raw = json.loads((shared_data / "pandalm_testset.json").read_text())
    good = [row for row in raw if isinstance(row["response1"], str) and isinstance(row["response2"], str)]
    dataset, _ = load_comparisons(shared_data / "pandalm_testset.json", group=False)
    metrics = quality_report(dataset).metrics
    labels = np.array([[row[f"annotator{k}"] for k in (1, 2, 3)] for row in good])
    table, _ = inter_rater.aggregate_raters(labels)
    assert metrics["fleiss_kappa"] == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-12)
    kappas = [cohen_kappa_score(labels[:, i], labels[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert metrics["cohen_kappa"] == pytest.approx(np.mean(kappas), abs=1e-12)
    assert metrics["agreement"] == pytest.approx(
        np.mean([labels[:, i] == labels[:, j] for i, j in ((0, 1), (0, 2), (1, 2))]), abs=1e-12
    )
    assert set(metrics["annotators"]) == {"annotator1", "annotator2", "annotator3"}
    empty = sum((row["response1"] == "") + (row["response2"] == "") for row in good)
    assert metrics["empty_completions"] == empty and 0 < metrics["label_noise"] < 0.2


def test_hh_helpful_has_its_known_length_bias(shared_data):
    dataset, _ = load_comparisons(shared_data / "hh_helpful_train.jsonl", split="train[:600]")
    metrics = quality_report(dataset).metrics
    wins = []
    for row in dataset:
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            lengths = [len(row["completions"][k][0]["content"]) for k in (i, j)]
            if lengths[0] != lengths[1]:
                wins.append((lengths[0] > lengths[1]) == (target > 0.5))
    assert metrics["longer_wins"]["share"] == pytest.approx(np.mean(wins))
    assert metrics["first_wins"] is None and metrics["label_noise"] is None  # chosen is always first, and judged once
    assert list(metrics["languages"])[0] == "en"


def test_circles_contradictions_ties_and_positions_worked_by_hand():
    triple = {"completions": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [0, 2]]}
    rows = [
        triple | {"targets": [1.0, 1.0, 1.0]},
        triple | {"targets": [1.0, 1.0, 0.0]},  # a > b > c > a
        triple | {"targets": [0.0, 0.0, 1.0]},  # the reverse
        triple | {"targets": [1.0, 0.5, 0.0]},  # a tie: no full triple
        {"completions": ["x", "y"], "pairs": [[0, 1], [1, 0], [0, 1]], "targets": [1.0, 1.0, 0.5]},
        {"completions": ["x", "y"], "pairs": [[0, 1], [1, 0]], "targets": [1.0, 0.0]},
    ]
    metrics = report_of(rows).metrics
    assert metrics["intransitive_triples"] == pytest.approx(2 / 3)
    assert metrics["contradictions"] == pytest.approx(1 / 14)  # of 4 * 3 + 2 pairs, the one that x and y both won
    assert metrics["ties"] == pytest.approx(2 / 17) and metrics["pairs"] == 17
    assert metrics["longer_wins"] is None  # all of one length


def test_random_judgments_give_a_quarter_of_circles():
    rng = random.Random(0)
    rows = [
        {"completions": list("abcd"), "pairs": [[i, j] for i in range(4) for j in range(i)]}
        | {"targets": [float(rng.random() < 0.5) for _ in range(6)]}
        for _ in range(500)
    ]
    assert report_of(rows).metrics["intransitive_triples"] == pytest.approx(0.25, abs=0.03)


def test_near_duplicates_and_leaks_are_found():
    texts = [f"Please explain to me in simple words how a {word} works and why" for word in "car boat train".split()]
    long = " ".join(f"word{k}" for k in range(60))
    prompts = [*texts, texts[0].upper(), long, long + " more", "hi", "ho"]
    rows = [pair() | {"prompt": prompt} for prompt in prompts]
    heldout = [pair() | {"prompt": prompt} for prompt in (long + " again", "something else entirely, and quite new")]
    metrics = report_of(rows, to_comparisons(Dataset.from_list(heldout))[0]).metrics
    assert metrics["near_duplicate_prompts"] == pytest.approx(2 / 8) and metrics["leaked_prompts"] == 0.5


def noisy_repeats(repeats, n=1500, error=0.2, seed=3):
    """Targets of n pairs, each judged `repeats` times, each time wrong at this rate."""
    rng = random.Random(seed)
    return [[float(rng.random() > error) for _ in range(repeats)] for _ in range(n)]


@pytest.mark.parametrize("repeats", [2, 3, 7])
def test_label_noise_is_recovered_from_votes_and_from_repeats(repeats):
    def voted(labels):
        return pair(votes=[{"annotator": str(k), "pair": [0, 1], "label": x} for k, x in enumerate(labels)])

    truth = noisy_repeats(repeats)
    metrics = report_of([voted(labels) for labels in truth]).metrics
    assert metrics["label_noise"] == pytest.approx(0.2, abs=0.03)
    assert metrics["accuracy_ceiling"] == 1 - metrics["label_noise"]
    again = [{"completions": ["a", "b"], "pairs": [[0, 1]] * repeats, "targets": labels} for labels in truth]
    assert report_of(again).metrics["label_noise"] == pytest.approx(metrics["label_noise"], abs=1e-12)


def test_label_noise_pools_pairs_of_judgments_by_hand():
    rows = [
        {"completions": ["a", "b"], "pairs": [[0, 1]] * 4, "targets": [1.0, 0.9, 0.7, 0.0]},  # 3 of 6 pairs agree
        {"completions": ["a", "b"], "pairs": [[0, 1]] * 5 + [[1, 0]], "targets": [1.0] * 5 + [0.0]},  # 15 of 15
        {"completions": ["a", "b"], "pairs": [[0, 1]] * 2, "targets": [0.5, 1.0]},  # one decided judgment: no pair
    ]
    metrics = report_of(rows).metrics
    assert metrics["label_noise"] == pytest.approx((1 - np.sqrt(2 * 18 / 21 - 1)) / 2)
    assert metrics["contradictions"] == pytest.approx(1 / 3)
    few = report_of(rows[:1])
    assert few.metrics["label_noise"] is None and few.notes["label_noise"] == "6 repeated judgments are too few"


def trl_rows(truth, completions=("a", "bb")):
    """Returns one source row per judgment, without annotators."""
    sides = [completions[:: 1 if label else -1] for labels in truth for label in labels]
    prompts = [f"what is number {k} good for today" for k, labels in enumerate(truth) for _ in labels]
    return Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in zip(prompts, sides, strict=True)]
    )


def test_equal_rows_without_annotator_are_no_evidence_of_agreement():
    truth = [[1.0, 1.0, 0.0], [1.0, 1.0], [0.0]] * 30
    dataset, _ = load_comparisons(trl_rows([row for k, row in enumerate(truth)]))
    report = quality_report(dataset)
    assert report.metrics["pairs"] == 30 * 4 and report.metrics["contradictions"] == pytest.approx(1 / 3)
    assert report.metrics["label_noise"] is None and "`votes` that name the annotator" in report.notes["label_noise"]
    assert "labels are wrong" not in report.verdict
    copies = [r for r in dataset if "duplicated_row" in r["flags"]]
    swapped = pair() | {"pairs": [[0, 1], [1, 0]], "targets": [1.0, 0.0]}  # shown in both orders: judged twice
    plain = [swapped | {"prompt": f"p{k}"} for k in range(30)]
    assert quality_report(as_dataset(plain)).metrics["label_noise"] == 0.0
    mixed = as_dataset(plain + copies)
    assert len(copies) == 60 and quality_report(mixed).metrics["label_noise"] is None
    # Only contradictions, because the source removed the copies: also no evidence.
    assert quality_report(load_comparisons(trl_rows([[1.0, 0.0]] * 30))[0]).metrics["label_noise"] is None


def test_one_annotator_who_repeats_or_contradicts_himself_is_one_vote():
    def row(k, *votes):
        return pair(votes=[{"annotator": n, "pair": [0, 1], "label": x} for n, x in votes]) | {"prompt": f"p{k % 60}"}

    once = [row(k, ("u", 1.0), ("v", float(k % 3 > 0)), (None, 0.0)) for k in range(60)]
    metrics = report_of(once).metrics
    assert (
        report_of([r | {"votes": r["votes"] + r["votes"][:1] * 5} for r in once]).metrics["label_noise"]
        == (metrics["label_noise"])
    )
    assert metrics["agreement"] == pytest.approx(2 / 3) and set(metrics["annotators"]) == {"u", "v"}
    both = [row(k, ("u", 1.0), ("u", 0.0), ("v", 1.0)) for k in range(60)]  # u: a tie on average
    assert report_of(both).metrics["agreement"] == 0.0 and report_of(both).metrics["label_noise"] is None


def test_graded_votes_agree_where_they_name_the_same_winner():
    grades = {1.0: (1.0, 0.75, 0.6), 0.5: (0.5,), 0.0: (0.0, 0.25, 0.49)}
    rng = random.Random(0)

    def rows(grade):
        rng.seed(5)
        labels = [[rng.choice((1.0, 1.0, 0.5, 0.0)) for _ in "abc"] for _ in range(60)]
        return [
            pair(votes=[{"annotator": n, "pair": [0, 1], "label": grade(x)} for n, x in zip("abc", r, strict=True)])
            for r in labels
        ]

    plain, graded = report_of(rows(lambda x: x)).metrics, report_of(rows(lambda x: random.choice(grades[x]))).metrics
    for name in ("agreement", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "annotators", "label_noise"):
        assert graded[name] == plain[name] and plain[name] is not None


def test_annotators_are_listed_lowest_first_and_the_rest_hinted_at():
    rows = []
    for k in range(40):
        votes = [{"annotator": f"n{n}", "pair": [0, 1], "label": float(k % 20 >= 9 - n)} for n in range(10)]
        rows.append(pair(votes=votes))
    report = report_of(rows)
    shares = list(report.metrics["annotators"].values())
    assert shares == sorted(shares) and shares[0] < shares[-1]
    shown = dict((name, value) for name, value, _ in report.rows())["annotators"]
    assert shown.count(",") == 8 and shown.endswith(", …")


@pytest.mark.parametrize("known", [None, False, True])
def test_position_bias_needs_the_order_that_people_saw(known):
    rows = [pair(target=target) for target in (1.0, 1.0, 0.0, 1.0, 0.5)]
    report = report_of(rows, order_known=known)
    if known:
        assert report.metrics["first_wins"]["share"] == 0.75
    else:
        assert report.metrics["first_wins"] is None and "not known which side" in report.notes["first_wins"]
    assert ("not known" in {name: why for name, _, why in report.rows()}["first wins"]) == (not known)


def test_the_order_is_part_of_what_a_kept_report_is_found_by(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    dataset = Dataset.from_list([pair() | {"prompt": f"prompt {k}"} for k in range(10_001)])
    assert quality_report(dataset).metrics["first_wins"] is None
    assert quality_report(dataset, order_known=True).metrics["first_wins"]["share"] == 1.0


VOTES = [{"annotator": name, "pair": [0, 1], "label": 1.0} for name in "ab"]
TINY = {
    "one pair": [pair()],
    "all ties": [pair(target=0.5), pair(target=0.5)],
    "equal votes": [pair(votes=VOTES)] * 6,
    "a vote of one": [pair(votes=VOTES[:1])],
    "votes apart": [pair(votes=VOTES[:1]), pair(votes=VOTES[1:])],
    "votes of nobody": [pair(votes=[VOTES[0] | {"annotator": None}] * 2)],
    "blank prompt and completions": [pair("", " ") | {"prompt": " "}],
    "only a system text": [
        {"prompt": [{"role": "system", "content": "s"}], "pairs": [[0, 1]], "targets": [1.0]}
        | {"completions": [[{"role": "assistant", "content": x}] for x in "ab"]}
    ],
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("known", [False, True])
def test_tiny_data_have_a_report_without_nan_and_a_reason_for_each_gap(tmp_path, name, known):
    dataset = Dataset.from_list([{"prompt": f"prompt {k}", **row} for k, row in enumerate(TINY[name])])
    report = quality_report(dataset, dataset.select([]), source=name, order_known=known)
    json.dumps(vars(report), allow_nan=False)
    gaps = [metric for metric, value in report.metrics.items() if value is None]
    assert set(report.metrics) == set(MEANINGS) and set(gaps) <= set(report.notes)
    assert report.metrics["leaked_prompts"] is None and "prompt" in report.verdict
    page = write_quality_page(report, tmp_path / "report.html").read_text()
    assert all(report.notes[metric] in page.replace("&#39;", "'") for metric in gaps)


@pytest.mark.parametrize("rows", [{"prompt": ["a"], "completion": ["b"]}, {"prompt": [], "pairs": []}])
def test_what_is_no_comparison_is_one_line(rows):
    with pytest.raises(PreferenceDataError, match=r"mine: .*prompt.* use load_comparisons"):
        quality_report(Dataset.from_dict(rows), source="mine")


def test_refusals_are_found_with_either_apostrophe():
    texts = ["I can’t help with that", "I can't help with that", "I’m sorry, but no", "I am not able to", "Can’t you?"]
    metrics = report_of([pair(text, f"Gladly {k}") for k, text in enumerate(texts)]).metrics
    assert metrics["refusals"] == pytest.approx(4 / 10)


def test_refusals_and_empty_completions_are_counted():
    rows = [pair("I'm sorry, but I can't help with that.", ""), pair("As an AI language model, I have no cat.", "Meow")]
    metrics = report_of(rows).metrics
    assert metrics["refusals"] == 0.5 and metrics["empty_completions"] == 1


def test_the_page_shows_every_metric_and_escapes_what_data_say(tmp_path):
    rows = [
        pair("<script>alert(1)</script>", "b", votes=[{"annotator": n, "pair": [0, 1], "label": 1.0}]) for n in "ab"
    ]
    rows[0]["votes"] = [{"annotator": f"<b>{n}</b>", "pair": [0, 1], "label": x} for n, x in (("u", 1.0), ("v", 0.0))]
    rows[1]["votes"] = [{"annotator": f"<b>{n}</b>", "pair": [0, 1], "label": 1.0} for n in "uv"]
    dataset, load_report = to_comparisons(
        Dataset.from_list([{"prompt": f"p{k}", **row} for k, row in enumerate(rows)]), source="<i>mine</i>.jsonl"
    )
    report = quality_report(dataset, source="<i>mine</i>.jsonl")
    page = write_quality_page(report, tmp_path / "report.html", load_report).read_text()
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;u" in page and "&lt;i&gt;mine" in page
    for name in MEANINGS:
        assert f"<td>{name.replace('_', ' ')}</td>" in page
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 3
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched from anywhere
    assert "2 rows in, 2 kept" in page and "Doubtful: 2 prompts are few" in page


def test_a_large_report_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = [
        {"prompt": f"a prompt of number {k} and more {k * k}", "chosen": "a", "rejected": "b b"} for k in range(10_001)
    ]
    dataset = to_comparisons(Dataset.from_list(rows))[0]
    first = quality_report(dataset)
    assert first.figures is first.metrics  # the name in earlier versions
    (kept,) = (tmp_path / "hf_rlhf_ext").iterdir()  # no unfinished file beside it
    assert json.loads(kept.read_text())["metrics"] == first.metrics
    monkeypatch.setattr("hf_rlhf_ext.quality.report._measure", None)
    assert quality_report(dataset) == first


def test_the_table_shows_names_from_data_as_they_are(recipes_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = ("[bold]u[/bold]", "[/]", ":smile:", "\x1b[2Jv", "日本")
    votes = [[{"annotator": n, "pair": [0, 1], "label": float(k > 0)} for n in names] for k in range(3)]
    spec = importlib.util.spec_from_file_location("inspect_data", recipes_path / "inspect_data.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.print_report(report_of([pair(votes=v) for v in votes]))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("[bold]u[/bold] 1.00", "[/] 1.00", ":smile: 1.00", "[2Jv 1.00", "日本 1.00"))
    assert "\x1b" not in shown


def word_triples(text):
    words = text.lower().split()
    return {tuple(words[k : k + 3]) for k in range(len(words) - 2)}


def jaccard(one, other):
    return len(one & other) / len(one | other)


def test_near_duplicates_of_real_prompts_are_those_of_brute_force(shared_data):
    dataset, _ = load_comparisons(shared_data / "hh_helpful_train.jsonl", split="train[:1200]")
    prompts = [p for p in map(question_of, dataset["prompt"]) if len(p.split()) >= 12][:300]
    index, kept, rng = PromptIndex(), [], random.Random(0)
    for prompt in prompts:
        if not index.holds(prompt, add=True):
            kept.append(word_triples(prompt))

    def changed(prompt):
        words = prompt.split()
        for _ in range(rng.randint(1, 3)):
            k = rng.randrange(len(words))
            words[k : k + 1] = rng.choice([[], ["indeed"], [words[k], "really"]])
        return " ".join(words).upper() + " \n"

    near = [(changed(prompt)) for prompt in prompts * 3]
    wanted = {prompt for prompt in near if max(jaccard(word_triples(prompt), one) for one in kept) >= 0.8}
    found = {prompt for prompt in near if index.holds(prompt)}
    assert 60 < len(wanted) < 600  # both kinds occur
    assert found <= wanted and len(found) >= 0.97 * len(wanted)


def test_templates_and_system_texts_make_no_duplicates_and_chinese_has_words():
    rng = random.Random(0)
    template = " ".join(rng.choices([f"w{k}" for k in range(500)], k=40))
    prompts = [f"{template} {' '.join(rng.choices([f'v{k}' for k in range(500)], k=13))}" for _ in range(400)]
    share = np.mean([jaccard(word_triples(a), word_triples(b)) for a, b in combinations(prompts[:20], 2)])
    assert share > 0.5 and near_duplicates(prompts)[0] == 0
    system = {"role": "system", "content": template}
    asked = [question_of([system, {"role": "user", "content": f"why is number {k} odd or not"}]) for k in range(5)]
    assert near_duplicates(asked)[0] == 0
    assert words_of("你好 world, テスト") == ["你", "好", "world,", "テ", "ス", "ト"]
    poem = "床前明月光疑是地上霜举头望明月低头思故乡"
    assert near_duplicates([poem, poem + "啊", "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少"])[0] == 1


def many_of_one_prompt(n):
    sides = [{"completions": [f"first {k}", f"second {k}"], "pairs": [[0, 1]], "targets": [1.0]} for k in range(n)]
    return [{"prompt": "the same for all", "row": k, "flags": [], **row} for k, row in enumerate(sides)]


def crowd(n):
    rng = random.Random(0)
    rows = []
    for k in range(n):
        votes = [{"annotator": f"n{a}", "pair": [0, 1], "label": 1.0} for a in rng.sample(range(5000), 3)]
        rows.append(pair(votes=votes) | {"prompt": f"prompt {k}", "row": k})
    return rows


def almost_equal(n):
    head = " ".join(f"word{k}" for k in range(30))
    return [pair() | {"prompt": f"{head} {k}", "row": k} for k in range(n)]


def star(n):
    pairs = [[0, k] for k in range(1, n)]
    one = {"prompt": "p", "completions": [f"c{k}" for k in range(n)], "pairs": pairs, "targets": [1.0] * len(pairs)}
    return [one | {"row": 0}]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shape", [many_of_one_prompt, crowd, almost_equal, star])
def test_twenty_thousand_of_anything_take_seconds(shape, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    start = time.process_time()
    metrics = quality_report(as_dataset(group_by_prompt(shape(20_000)))).metrics
    assert time.process_time() - start < 60  # each took minutes, or all memory, when it was quadratic
    if shape is almost_equal:
        assert metrics["near_duplicate_prompts"] == pytest.approx(1, abs=1e-4)


# --- what the verdict weighs -----------------------------------------------------------------------------------------


def verdict_of(share_contradicted, share_tied=0.0, load_report=None, votes=False):
    """The verdict on 600 pairs, of which a share was judged both ways and a share is tied."""
    rows = []
    for k in range(600):
        # Prompts and answers of equal length differ in many words, so that nothing else is doubtful.
        row = pair(f"answer {k:04} one", f"answer {k:04} two") | {"prompt": f"about {k * 7919 % 1009} and {k}"}
        if k < share_tied * 600:
            row |= {"targets": [0.5]}
        elif k >= (1 - share_contradicted) * 600:
            row |= {"pairs": [[0, 1], [0, 1]], "targets": [1.0, 0.0]}
        if votes:
            row["votes"] = [{"annotator": name, "pair": [0, 1], "label": 1.0} for name in "ab"]
        rows.append(row)
    return quality_report(as_dataset(rows), load_report=load_report).verdict


@pytest.mark.parametrize("share, is_doubtful", [(0.0, False), (0.05, False), (0.2, True), (0.5, True)])
def test_pairs_judged_both_ways_make_data_doubtful(share, is_doubtful):
    verdict = verdict_of(share)
    assert verdict.startswith("Doubtful") == is_doubtful
    assert ("both ways" in verdict) == is_doubtful


def test_where_label_noise_is_known_it_says_more_than_contradictions():
    assert "both ways" not in verdict_of(0.3, votes=True)


@pytest.mark.parametrize("share, is_doubtful", [(0.3, False), (0.7, True)])
def test_many_ties_make_data_doubtful(share, is_doubtful):
    assert ("70% of the judgments are ties" in verdict_of(0.0, share)) == is_doubtful


def test_a_column_that_was_waived_makes_data_doubtful_and_others_do_not():
    harmless = LoadReport("mine", unread={"id": "metadata", "note": "text"})
    assert not verdict_of(0.0, load_report=harmless).startswith("Doubtful")
    waived = LoadReport("mine", unread={"system": "prompt material, ignored", "note": "text"})
    assert "ignored (system)" in verdict_of(0.0, load_report=waived)


def test_the_load_report_gives_source_and_order():
    rows = as_dataset([pair(f"a {k}", f"b {k}") | {"prompt": f"p{k}"} for k in range(30)])
    report = quality_report(rows, load_report=LoadReport("mine", order_known=True))
    assert report.source == "mine" and report.metrics["first_wins"] is not None
    report = quality_report(rows, source="yours", order_known=False, load_report=LoadReport("mine", order_known=True))
    assert report.source == "yours" and report.metrics["first_wins"] is None


def test_the_page_lists_columns_that_were_not_read(tmp_path):
    report = report_of([pair()])
    load_report = LoadReport("mine", 1, 1, unread={"<b>": "text", "system": "prompt material, ignored"})
    page = write_quality_page(report, tmp_path / "report.html", load_report).read_text()
    assert "Columns that were not read" in page and "prompt material, ignored" in page
    assert "&lt;b&gt;" in page and "<td><b></td>" not in page
    assert "not read" not in write_quality_page(report, tmp_path / "r.html", LoadReport("mine", 1, 1)).read_text()


def test_the_category_of_comparisons_reaches_the_accuracy_by_category():
    rows = [
        {"prompt": f"p{k}", "chosen": f"good {k}", "rejected": f"bad {k}", "domain": "code" if k % 2 else "chat"}
        for k in range(40)
    ]
    dataset, report = load_comparisons(rows, category_column="domain")
    assert "domain" not in report.unread

    def prefers_good(prompts, completions):
        return [float("good" in str(completion)) for completion in completions]

    checked = check_reward(prefers_good, dataset, probes=False)
    assert {name: group["n"] for name, group in checked.groups["category"].items()} == {"chat": 20, "code": 20}
