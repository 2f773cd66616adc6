"""Export and import: every vote comes back, nothing is left out without a count, and the rows train a reward model."""

import json
import random

import pytest

from hf_rlhf_ext import load_comparisons, load_demonstrations, quality_report
from hf_rlhf_ext.cli.options import DemonstrationArguments
from hf_rlhf_ext.cli.rows import choose_demonstrations
from hf_rlhf_ext.collect.export import (
    comparisons,
    demonstrations,
    import_judged,
    write_comparisons,
    write_demonstrations,
    write_rows,
)
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.data.schema import validate_comparison
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.quality.refine import filter_comparisons
from tests.collect.conftest import make_tasks
from tests.hub.conftest import hub  # noqa: F401  (a fixture)


def judge(store, person, answer_of, seconds=1.0):
    """Judges all tasks as one person. `answer_of(task)` gives the answer by completion, which is shown shuffled."""
    while shown := store.next_task(person):
        answer = in_display_order(answer_of(shown.task), shown.order)
        store.judge(person, shown.task.id, f"key-{person}-{shown.task.id:06d}", answer, seconds)


def in_display_order(answer, order):
    """Independent of the library: what a person who sees the completions in this order would send."""
    answer = dict(answer)
    if "preference" in answer and order == [1, 0]:
        answer["preference"] = {1: 7, 2: 6, 3: 5, 4: 4, 5: 3, 6: 2, 7: 1}[answer["preference"]]
    for name in ("ranks", "flags", "ratings"):
        if name in answer:
            answer[name] = [answer[name][completion] for completion in order]
    if "edited" in answer and answer["edited"]["position"] is not None:
        answer["edited"] = answer["edited"] | {"position": order.index(answer["edited"]["position"])}
    return answer


def vote(annotator, pair, label, confidence=None):
    return {"annotator": annotator, "pair": pair, "label": label, "confidence": confidence}


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_the_seven_points_of_the_scale(make_store):
    store = make_store(7, ["ann"], gold_share=0)
    judge(store, 1, lambda task: {"preference": task.id})
    rows, report = comparisons(store)
    assert [row["targets"] for row in rows] == [[1.0], [1.0], [1.0], [0.5], [0.0], [0.0], [0.0]]
    found = [(row["votes"][0]["label"], row["votes"][0]["confidence"]) for row in rows]
    assert found == [(1, 1), (1, 2 / 3), (1, 1 / 3), (0.5, None), (0, 1 / 3), (0, 2 / 3), (0, 1)]
    assert (report.rows_in, report.kept, report.dropped) == (7, 7, {})


def test_ranks_become_one_vote_per_pair_and_targets_the_mean(make_store):
    store = make_store([Task("q", ["a", "b", "c"], made_by=[{"policy": p} for p in "xyz"])], wanted=2)
    judge(store, 1, lambda task: {"ranks": [2, 1, 2]})
    judge(store, 2, lambda task: {"ranks": [1, 2, 3]})
    ((row,), _) = comparisons(store)
    assert row["pairs"] == [[0, 1], [0, 2], [1, 2]] and row["targets"] == [0.5, 0.75, 1.0]
    assert row["votes"] == [
        vote("ann", [0, 1], 0.0), vote("ann", [0, 2], 0.5), vote("ann", [1, 2], 1.0),
        vote("bob", [0, 1], 1.0), vote("bob", [0, 2], 1.0), vote("bob", [1, 2], 1.0),
    ]  # fmt: skip
    assert row["made_by"] == [{"policy": "x"}, {"policy": "y"}, {"policy": "z"}]
    ((row,), _) = comparisons(store, annotators=["bob"])
    assert row["targets"] == [1.0, 1.0, 1.0]
    with pytest.raises(UserError, match="'eve' is unknown"):
        comparisons(store, annotators=["eve"])


def test_flags_and_category(make_store):
    tasks = [Task(f"q{k}", ["a", "b"], category="chat", source="ours", row=7) for k in range(3)]
    store = make_store(tasks, wanted=3)
    flags = {"flags": [[], ["nonsense", "harmful"]]}
    judge(store, 1, lambda task: {"preference": 1, "category": "code"} | flags)
    judge(store, 2, lambda task: {"preference": 1, "category": "code"} if task.id == 1 else {"preference": 1})
    skip = {"skip": True, "flags": [["wrong_language"], []]}
    judge(store, 3, lambda task: skip if task.id == 1 else {"preference": 4})
    rows, report = comparisons(store)
    assert rows[0]["flags"] == ["harmful:1", "nonsense:1", "wrong_language:0"]
    assert rows[1]["flags"] == rows[2]["flags"] == ["harmful:1", "nonsense:1"]
    assert [row["category"] for row in rows] == ["code", "chat", "chat"]
    assert {(row["source"], row["row"]) for row in rows} == {("ours", 7)}
    assert report.flagged == {"skipped by some": [1]}


def test_everything_left_out_is_counted(make_store):
    tasks = [
        Task("judged", ["a", "b"], batch="one"),
        Task("skipped", ["a", "b"], batch="two"),
        Task("rate", ["a"], batch="two"),
        Task("open", ["a", "b"], batch="one"),
        Task("gold", ["a", "b"], gold={"best": [0]}),
    ]
    answers = {"skipped": {"skip": True}, "rate": {"ratings": [5]}}
    store = make_store(tasks, ["ann"], gold_share=0.5)
    for _ in range(4):  # one of them is the gold question
        shown = store.next_task(1)
        answer = answers.get(shown.task.prompt, {"preference": 1, "comment": "hm"})
        store.judge(1, shown.task.id, f"key-{shown.task.id:06d}", answer, 1.0)
    rows, report = comparisons(store)
    assert [row["prompt"] for row in rows] == ["judged"]
    expected = {"skipped": [2], "rated, not compared": [3], "not judged yet": [4], "gold question": [5]}
    assert report.dropped == expected and report.rows_in == 5 and report.kept == 1
    assert "comments" in report.summary()
    assert len(comparisons(store, include_gold=True)[0]) == 2
    assert comparisons(store, batch="one")[1].dropped == {"not judged yet": [4]}
    assert comparisons(store, batch="two")[0] == []


def rich_store(make_store, name="rich.sqlite", seed=0):
    """Pairs and K-wise tasks, several people, ties, flags, ratings, two tasks with one prompt, and made_by."""
    rng = random.Random(seed)
    tasks = []
    for k in range(60):
        n = rng.choice([2, 2, 3, 4])
        made_by = [{"policy": rng.choice(["sft", "ppo"]), "seed": k, "top_p": 0.9} for _ in range(n)]
        if k % 5 == 0:
            made_by[1] = {"policy": "base"}  # other keys
        completions = [f"Answer {k} {j}" + " more" * j for j in range(n)]
        tasks.append(
            Task(f"Question {k}?", completions, made_by, category=rng.choice([None, "chat"]), source="x", row=k)
        )
    tasks[19] = Task(tasks[18].prompt, ["Answer 18 0", "New one"], category=tasks[18].category, made_by=[{}, {"p": 1}])
    store = make_store(tasks, ["ann", "bob", "cem", "dan"], name=name, wanted=3, gold_share=0)

    def answer_of(task):
        n = len(task.completions)
        answer = {"ratings": [rng.choice([None, 2, 6]) for _ in range(n)]}
        answer["flags"] = [rng.choice([[], [], ["harmful"]]) for _ in range(n)]
        if rng.random() < 0.1:
            return {"skip": True}
        if n == 2:
            return answer | {"preference": rng.randint(1, 7)}
        return answer | {"ranks": [rng.randint(1, n) for _ in range(n)]}

    for person in (1, 2, 3, 4):
        judge(store, person, answer_of)
    return store


def by_texts(rows):
    """Everything about each pair of texts, whatever the order of rows and completions."""
    found = []
    for row in rows:
        row = {name: value for name, value in row.items() if value is not None}
        texts = row["completions"]
        flags = sorted((flag.split(":")[0], texts[int(flag.split(":")[1])]) for flag in row["flags"])
        made_by = [(texts[k], json.dumps(record, sort_keys=True)) for k, record in enumerate(row.get("made_by", ()))]
        votes = sorted(
            (v["annotator"], texts[v["pair"][0]], texts[v["pair"][1]], v["label"], str(v["confidence"]))
            for v in row.get("votes", ())
        )
        pairs = [(texts[i], texts[j], target) for (i, j), target in zip(row["pairs"], row["targets"], strict=True)]
        found.append((row["prompt"], row.get("category"), sorted(pairs), votes, flags, sorted(made_by)))
    return found


@pytest.mark.parametrize("group", [True, False])
def test_the_reader_gives_back_every_vote(make_store, tmp_path, group):
    store = rich_store(make_store)
    path = tmp_path / "comparisons.jsonl"
    report = write_comparisons(store, path)
    rows, _ = comparisons(store)
    assert len(rows) == report.kept > 50
    for index, row in enumerate(rows):
        validate_comparison(row, index=index)
    dataset, loaded = load_comparisons(path, group=group)
    assert loaded.unread == {} and loaded.dropped == {}
    read = by_texts(dataset)
    if not group:
        assert read == by_texts(rows)
        assert [row["row"] for row in dataset] == [row.get("row", index) for index, row in enumerate(rows)]
        for row in dataset:
            assert row["weights"] == pytest.approx([1 / len(row["pairs"])] * len(row["pairs"]))
        return
    # Two tasks with one prompt are one row now, with the judgments, flags and made_by of both.
    assert len(read) == len(rows) - 1
    merged = next(row for row in dataset if "New one" in row["completions"])
    parts = [row for row in rows if row["prompt"] == merged["prompt"]]
    assert len(parts) == 2
    ((_, _, pairs, votes, flags, made_by),) = by_texts([merged])
    of_parts = by_texts(parts)
    assert votes == sorted(of_parts[0][3] + of_parts[1][3])
    assert pairs == sorted(of_parts[0][2] + of_parts[1][2])
    assert set(flags) == {*of_parts[0][4], *of_parts[1][4]} and flags
    # "Answer 18 0" is in both; the record of the first row counts.
    assert dict(made_by) == dict(of_parts[1][5]) | dict(of_parts[0][5])
    assert len(made_by) == len(merged["completions"])


def test_export_and_import_again_keep_every_vote(make_store, tmp_path):
    store = rich_store(make_store)
    rows, _ = comparisons(store)
    other = make_store(0, ["ann"], name="other.sqlite")
    report = import_judged(other, rows, batch="imported")
    assert report.kept == len(rows) and report.flagged == {} and report.dropped == {}
    again, _ = comparisons(other, batch="imported")
    assert by_texts(again) == by_texts(rows)
    assert len(other.annotators()) == 4 and other.next_task(1) is None
    # From the file too. Nothing is imported twice.
    write_comparisons(store, tmp_path / "rows.jsonl")
    assert import_judged(other, rows).dropped == {"already judged by the same people": list(range(len(rows)))}
    third = make_store(0, [], name="third.sqlite")
    import_judged(third, tmp_path / "rows.jsonl")
    dataset, _ = load_comparisons(tmp_path / "rows.jsonl")
    assert by_texts(comparisons(third)[0]) == by_texts(dataset)


def test_import_of_rows_without_votes_and_with_what_a_store_does_not_keep(make_store, tmp_path):
    path = tmp_path / "trl.jsonl"
    write_rows([{"prompt": f"q{k}", "chosen": "good", "rejected": "bad"} for k in range(3)], path)
    store = make_store(0, [])
    assert import_judged(store, path).kept == 3
    rows, _ = comparisons(store)
    assert [row["targets"] for row in rows] == [[1.0]] * 3
    assert {v["annotator"] for row in rows for v in row["votes"]} == {"imported"}
    assert store.annotators()[0].judged == 3 and store.progress(1)["median_seconds"] is None

    odd = {
        "prompt": "odd",
        "completions": ["a", "b", "c"],
        "pairs": [[1, 0], [1, 2]],
        "targets": [0.75, 0.9],
        "votes": [vote("ann", [1, 0], 0.75), vote(None, [1, 0], 0.25)],
        "weights": [2.0, 1.0],
        "margins": [0.0, 1.0],
    }
    report = import_judged(store, [odd])
    assert sorted(name[:7] for name in report.flagged) == ["margins", "targets", "weights"]
    row = comparisons(store)[0][-1]
    assert row["pairs"] == [[0, 1], [1, 2]] and row["targets"] == [0.5, 0.9]
    assert row["votes"][0] == vote("ann", [1, 0], 0.75)
    with pytest.raises(UserError, match="row 0.*targets"):
        import_judged(store, [odd | {"targets": [2.0, 0.0]}])


def test_import_into_a_store_that_has_the_task_with_the_completions_in_another_order(make_store):
    store = make_store([Task("q", ["b", "a"])], ["ann"], gold_share=0)
    judge(store, 1, lambda task: {"preference": 1})  # b is much better
    row = {
        "prompt": "q",
        "completions": ["a", "b"],
        "pairs": [[0, 1]],
        "targets": [0.5],
        "votes": [vote("bob", [0, 1], 0.0, 1 / 3), vote("cem", [0, 1], 1.0), vote("ann", [0, 1], 1.0)],
        "flags": ["harmful:0"],
    }
    assert import_judged(store, [row]).kept == 1
    ((found,), _) = comparisons(store)
    assert found["completions"] == ["b", "a"] and found["flags"] == ["harmful:1"]
    assert found["votes"] == [
        vote("ann", [0, 1], 1.0, 1.0),
        vote("bob", [0, 1], 1.0, 1 / 3),
        vote("cem", [1, 0], 1.0),
    ]
    assert store.counts() == {"tasks": 1, "complete": 1, "judgments": 3, "wanted": 3}
    # An imported judgment can be taken back by its person, who then judges anew.
    store.undo(2, "undo-0001")
    store.judge(2, 1, "key-0001", {"preference": 4}, 1.0)
    assert [v["annotator"] for v in comparisons(store)[0][0]["votes"]] == ["ann", "cem", "bob"]


def test_import_of_one_vote_on_a_ranking_in_another_order(make_store):
    store = make_store([Task("q", ["c", "a", "b"])], [])
    row = {
        "prompt": "q",
        "completions": ["a", "b", "c"],
        "pairs": [[0, 1]],
        "targets": [1.0],
        "votes": [vote("bob", [0, 1], 1.0, 1.0)],
    }
    import_judged(store, [row])
    ((found,), _) = comparisons(store)
    assert found["pairs"] == [[1, 2]] and found["targets"] == [1.0], "a is better than b"


def test_import_says_what_it_does_not_keep(make_store):
    store = make_store(0, [])
    row = {"prompt": "q", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [1.0]}
    first = row | {
        "votes": [vote("ann", [0, 1], 1.0)],
        "tools": '[{"type": "function"}]',
        "flags": ["empty_completion"],
    }
    flagged = import_judged(store, [first]).flagged
    assert [name.split(",")[0] for name in flagged] == ["column tools", "flags of other kinds"]
    second = row | {"targets": [0.5], "votes": [vote("ann", [0, 1], 0.0), vote("bo\ud83d", [0, 1], 1.0)]}
    report = import_judged(store, [second], batch="later")
    assert (report.kept, len(report.flagged)) == (1, 1) and "judged it already" in report.summary()
    ((found,), _) = comparisons(store, batch="later")
    assert found["votes"] == [vote("ann", [0, 1], 1.0), vote("bo?", [0, 1], 1.0)]


def test_export_of_an_unknown_batch_or_over_the_store(make_store, tmp_path):
    store = make_store([Task("q", ["a", "b"], batch="one")], ["ann", "bob"], gold_share=0)
    judge(store, 1, lambda task: {"preference": 1, "edited": {"position": None, "text": "c"}})
    for call in (comparisons, demonstrations):
        with pytest.raises(UserError, match="'two' is unknown.*it has one"):
            call(store, batch="two")
    for call in (write_comparisons, write_demonstrations):
        with pytest.raises(UserError, match="the store itself"):
            call(store, store.path)
    assert comparisons(store, annotators=["bob"])[1].dropped == {"not judged by these people": [1]}
    assert "exported as demonstrations" in comparisons(store)[1].summary()


def test_an_edit_that_changed_nothing_and_a_corrected_category(make_store, caplog):
    store = make_store([Task(user("q"), [assistant("a"), assistant("b")], category="chat")], ["ann", "bob"], wanted=2)
    code = {"preference": 1, "category": "code"}
    judge(store, 1, lambda task: code | {"edited": {"position": 1, "text": "b \n"}})
    judge(store, 2, lambda task: code | {"edited": {"position": 1, "text": "b!"}})
    (row,) = demonstrations(store)
    assert (row["completion"], row["category"]) == (assistant("b!"), "code")
    assert "changed nothing are left out: 1" in caplog.text


def test_a_batch_has_the_judgments_that_were_made_in_an_earlier_one(make_store):
    # In rounds, two policies may give the same two answers as two earlier ones.
    store = make_store([Task("q", ["a", "b"], batch="evaluation-1")], ["ann"], gold_share=0)
    judge(store, 1, lambda task: {"preference": 1})
    store.add_tasks([Task("q", ["b", "a"], batch="evaluation-2"), Task("r", ["a", "b"], batch="evaluation-2")])
    judge(store, 1, lambda task: {"preference": 7})
    rows, report = comparisons(store, batch="evaluation-2")
    assert [(row["prompt"], row["targets"]) for row in rows] == [("q", [1.0]), ("r", [0.0])]
    assert (report.rows_in, report.kept) == (2, 2) and comparisons(store, batch="evaluation-1")[1].kept == 1


def test_demonstrations_can_be_selected_by_rating(make_store, tmp_path):
    tasks = [Task(f"q{k}", ["bad", "good"], category="chat") for k in range(10)] + [Task("rate", ["fine"])]
    store = make_store(tasks, ["ann", "bob"], wanted=2, gold_share=0)

    def of_ann(task):
        if len(task.completions) == 1:
            return {"ratings": [6]}
        answer = {"preference": 6, "ratings": [2, 7]}
        return answer | {"edited": {"position": 1, "text": "best"}} if task.id == 1 else answer

    judge(store, 1, of_ann)
    judge(store, 2, lambda task: {"ratings": [5]} if len(task.completions) == 1 else {"preference": 6})
    path = tmp_path / "demonstrations.jsonl"
    assert write_demonstrations(store, path) == len(demonstrations(store)) == 22
    dataset, report = load_demonstrations(path)
    assert report.kept == 22 and report.dropped == {} and not report.waived
    found = {(row["prompt"], row["completion"]): row["rating"] for row in dataset}
    assert found["q0", "best"] is None and found["q0", "good"] == 7 and found["rate", "fine"] == 5.5
    assert not any(row["flags"] for row in dataset)
    arguments = DemonstrationArguments(min_rating=5)
    selected, counts = choose_demonstrations(dataset, arguments)
    assert {row["completion"] for row in selected} == {"best", "good", "fine"} and counts["rating"][
        "rated_dropped"
    ] == 10


def test_demonstrations_of_conversations(make_store, tmp_path):
    store = make_store([Task(user("Hi"), [assistant("Ho"), assistant("Hey")])], ["ann"], gold_share=0)
    judge(store, 1, lambda task: {"preference": 1, "edited": {"position": None, "text": "Hello!"}})
    write_demonstrations(store, tmp_path / "rows.jsonl")
    (row,) = load_demonstrations(tmp_path / "rows.jsonl")[0]
    assert (row["prompt"], row["completion"]) == (user("Hi"), assistant("Hello!"))
    write_comparisons(store, tmp_path / "pairs.jsonl")
    (row,) = load_comparisons(tmp_path / "pairs.jsonl")[0]
    assert row["completions"] == [assistant("Ho"), assistant("Hey")]


def test_made_by_and_flags_stay_with_their_completion_when_others_are_removed(make_store, tmp_path):
    task = Task("q", ["a", "b" + " word" * 50, "c"], made_by=[{"policy": name} for name in "xyz"])
    store = make_store([task], ["ann"], gold_share=0)
    judge(store, 1, lambda task: {"ranks": [1, 2, 3], "flags": [["nonsense"], ["harmful"], ["harmful"]]})
    write_comparisons(store, tmp_path / "rows.jsonl")
    rows, _ = load_comparisons(tmp_path / "rows.jsonl")
    (row,) = filter_comparisons(rows, max_length_gap=10)[0]
    assert row["completions"] == ["a", "c"] and row["made_by"] == [{"policy": "x"}, {"policy": "z"}]
    assert row["flags"] == ["harmful:1", "nonsense:0"]


def test_nothing_to_export_is_said(make_store, tmp_path):
    store = make_store(3)
    with pytest.raises(UserError, match="3 dropped: not judged yet"):
        write_comparisons(store, tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="no answer was edited or rated"):
        write_demonstrations(store, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_rows_can_be_pushed(make_store, hub, tmp_path):  # noqa: F811  (the fixture)
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    from hf_rlhf_ext import push_comparisons

    store = rich_store(make_store)
    write_comparisons(store, tmp_path / "rows.jsonl")
    dataset, report = load_comparisons(tmp_path / "rows.jsonl")
    push_comparisons(dataset, "judged", licenses={"ours": "mit"}, report=report, quality=quality_report(dataset))
    path = hf_hub_download("alice/judged", "data/train-00000-of-00001.parquet", repo_type="dataset")
    pulled = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    again, _ = load_comparisons(pulled)
    numbered = [row | {"votes": [v | {"annotator": "x"} for v in row["votes"]]} for row in dataset]
    same = [row | {"votes": [v | {"annotator": "x"} for v in row["votes"]]} for row in again]
    assert by_texts(same) == by_texts(numbered)
    card = hub.files("alice/judged", "datasets")["README.md"].decode()
    assert "made" in card and "such as the policy" in card


@pytest.mark.slow
def test_a_reward_model_learns_from_the_export(make_store, tmp_path, tiny_config, chat_tokenizer):
    import torch
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification

    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer

    tasks = [Task(f"Day {k}?", ["A sunny day in the garden.", "Sad words, sad words."]) for k in range(24)]
    store = make_store([*tasks, *make_tasks(2)], ["ann", "bob"], wanted=2, gold_share=0)
    judge(store, 1, lambda task: {"preference": 2})
    judge(store, 2, lambda task: {"preference": 3})
    write_comparisons(store, tmp_path / "rows.jsonl")
    rows, _ = load_comparisons(tmp_path / "rows.jsonl")
    tiny_config.num_labels = 1
    torch.manual_seed(0)
    arguments = BradleyTerryConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=12,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = BradleyTerryTrainer(
        LlamaForSequenceClassification(tiny_config),
        arguments,
        rows,
        processing_class=chat_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0], losses
