"""A judge that shares words, weights or training rows with the training reward is refused in one line."""

import json

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file

from hf_rlhf_ext.collect.simulated import GoldReward
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import content_digest
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.study.independence import TrainingReward, check_independence
from hf_rlhf_ext.study.judges import PairwiseJudge, PeopleJudge, RewardModelJudge, ScoreJudge, judge_from
from hf_rlhf_ext.study.training_rows import DATA_SUFFIXES

CHEERFUL = {"happy", "glad", "sunny"}


def cheerful(prompts, completions):
    return [float(sum(word in CHEERFUL for word in text.split())) for text in completions]


def short(completions, **columns):
    return [-float(len(text)) for text in completions]


def nautical(prompts, first, second):
    return [float(a.count("sail") > b.count("sail")) for a, b in zip(first, second, strict=True)]


def found(judge, **reward):
    """The statements on one judge, as (what, status), and their text."""
    statements = check_independence([judge], TrainingReward(**reward))
    return {statement.what: statement.status for statement in statements}, " ".join(s.text for s in statements)


def refusal(judge, **reward):
    with pytest.raises(UserError) as caught:
        check_independence([judge], TrainingReward(**reward))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_reward_with_words_of_the_judge_is_refused_with_both_places():
    message = refusal(judge_from("vader"), functions=[cheerful])
    assert "3 of 3 words (glad, happy, sunny)" in message
    assert "_analyzer.lexicon" in message and "CHEERFUL" in message and "other words" in message


def test_the_same_function_is_refused_also_when_it_was_loaded_twice(tmp_path):
    from hf_rlhf_ext.cli.functions import reward_function

    path = tmp_path / "judge_of_independence.py"
    path.write_text("def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n")
    judge = judge_from({"gold": f"{path}:score"}, load=reward_function)
    path.write_text(path.read_text() + "\n")  # makes another module of the same file
    again = reward_function(f"{path}:score", "reward_funcs")
    assert again is not judge.functions[0]
    assert "is a function of training reward, score" in refusal(judge, functions=[again])
    assert "is a function of training reward" in refusal(PairwiseJudge(short), functions=[cheerful, short])


def test_a_judge_with_other_words_is_independent_and_it_is_said_how_many_were_compared():
    statuses, text = found(PairwiseJudge(nautical, "boats"), functions=[cheerful, short])
    assert statuses == {"words": "independent"}
    assert "1 words in 1 lists and 3 words in 1 lists" in text and "no list of words" in text
    statuses, text = found(judge_from("vader"), reward_model="runs/reward")
    assert statuses == {"words": "independent"} and "which is no function" in text


def test_code_that_cannot_be_read_is_unknown():
    statuses, text = found(ScoreJudge(max), functions=[short])
    assert statuses == {"words": "unknown"} and "cannot be read" in text


def test_the_same_model_in_memory_is_refused(tiny_llama, chat_tokenizer):
    from transformers import LlamaForSequenceClassification

    tiny_llama.config.num_labels = 1
    scorer = RewardScorer(LlamaForSequenceClassification(tiny_llama.config), chat_tokenizer)

    def through_the_same_model(prompts, completions):
        return scorer(prompts, completions)

    assert "same model" in refusal(ScoreJudge(through_the_same_model), functions=[scorer])


# --- weights and rows -------------------------------------------------------------------------------------------------


def pairs(*numbers, say="yes"):
    return [
        {"prompt": f"question {n}", "completions": [f"{say} {n}", f"no {n}"], "pairs": [[0, 1]], "targets": [1.0]}
        for n in numbers
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def reward_folder(tmp_path):
    """Makes the folder of a reward model, with what training writes down of its rows."""

    def make(name, rows=None, *, seed=0, dataset=None):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(seed)
        save_file({"w": torch.randn(4)}, folder / "adapter_model.safetensors")
        if rows is not None:
            data = write(tmp_path / f"{name}.jsonl", rows)
            record = {"role": "comparisons", "sha256": content_digest(data, DATA_SUFFIXES)}
            (folder / "report.json").write_text(json.dumps({"card": {"data": [record]}}))
            dataset = str(data)
        if dataset is not None:
            (folder / "training_config.yaml").write_text(yaml.safe_dump({"dataset_name": dataset}))
        return folder

    return make


def test_reward_models_of_other_rows_are_independent_and_their_rows_are_counted(reward_folder):
    judge = RewardModelJudge(reward_folder("judge", pairs(1, 2, 3)))
    training = reward_folder("training", pairs(3, 4, say="maybe"), seed=1)
    statuses, text = found(judge, reward_model=training)
    assert statuses == {"weights": "independent", "rows": "independent"}
    assert "trained on 3 pairs" in text and "on 2" in text and "of the judge's 3 prompts, 1 are in both" in text


def test_a_shared_training_row_is_refused_whatever_its_form(reward_folder):
    judge = RewardModelJudge(reward_folder("judge", pairs(1, 2, 3)))
    same = {"prompt": [{"role": "user", "content": "question  2"}], "completions": [], "pairs": [[0, 1]]}
    same["completions"] = [[{"role": "assistant", "content": text}] for text in ("no 2", "yes 2\n")]
    message = refusal(judge, reward_model=reward_folder("training", seed=1), trained_on=[same])
    assert "share 1 of 3 pairs" in message and "question 2" in message and "without them" in message
    # Systems that learn from comparisons without a reward model, such as DPO.
    assert "share 1 of 3 pairs" in refusal(judge, trained_on=[same])


def test_the_same_weights_are_refused_also_in_a_copy(reward_folder):
    judge = RewardModelJudge(reward_folder("judge", pairs(1)))
    assert "same weights" in refusal(judge, reward_model=reward_folder("copy", pairs(2)))
    assert "same weights" in refusal(judge, reward_model=judge.reward_model)
    assert "same weights" in refusal(RewardModelJudge("org/model"), reward_model="org/model")


def test_rows_whose_folder_is_not_told_are_found_beside_the_model(reward_folder):
    folder = reward_folder("judge", pairs(1, 2))
    (folder / "training_config.yaml").write_text("dataset_name: <path>/judge.jsonl")
    judge = RewardModelJudge(folder)
    assert "share 1 of 2 pairs" in refusal(judge, trained_on=pairs(2))
    (folder / "training_config.yaml").write_text("dataset_name: <path>/judge_data")
    statuses, text = found(judge, trained_on=pairs(2))
    assert statuses["rows"] == "unknown" and "are not there" in text and "Hub" not in text


@pytest.mark.parametrize("loss", ["changed", "gone", "no config", "on the hub"])
def test_rows_that_cannot_be_found_are_unknown_with_the_remedy(reward_folder, tmp_path, loss):
    judge_folder = reward_folder("judge", pairs(1), seed=1)
    if loss == "changed":
        write(tmp_path / "judge.jsonl", pairs(1, 5))
    elif loss == "gone":
        (tmp_path / "judge.jsonl").unlink()
    elif loss == "no config":
        (judge_folder / "training_config.yaml").unlink()
    else:
        (judge_folder / "training_config.yaml").write_text("dataset_name: org/data")
    training = reward_folder("training", pairs(2))
    statuses, text = found(RewardModelJudge(judge_folder), reward_model=training)
    assert statuses == {"weights": "independent", "rows": "unknown"}
    assert "give `trained_on`" in text
    named = RewardModelJudge(judge_folder, trained_on=write(tmp_path / "named.jsonl", pairs(7)))
    assert found(named, reward_model=training)[0]["rows"] == "independent"


def test_rows_that_are_not_there_are_told_by_the_digest_of_their_file(reward_folder, tmp_path):
    folder = reward_folder("judge", pairs(1, 2), seed=1)
    moved = (tmp_path / "judge.jsonl").rename(tmp_path / "moved.jsonl")
    judge = RewardModelJudge(folder)
    copy = write(tmp_path / "copy.jsonl", pairs(1, 2))
    said = "same SHA-256: report.json in .*judge says so.*other comparisons.*trained_on"
    for reward in ({"trained_on": copy}, {"trained_on": [copy]}, {"trained_on": pairs(2), "files": [copy]}):
        with pytest.raises(UserError, match=said):
            found(judge, **reward)
    training = reward_folder("training", pairs(1, 2))  # both files are gone
    (tmp_path / "training.jsonl").unlink()
    with pytest.raises(UserError, match=said):
        found(judge, reward_model=training)
    # Other rows, and two splits of one folder, are unknown as before; rows that the user names are believed.
    assert found(judge, trained_on=pairs(2))[0]["rows"] == "unknown"
    for name, split in (("judge", "train"), ("training", "test")):
        report = tmp_path / name / "report.json"
        (record,) = json.loads(report.read_text())["card"]["data"]
        report.write_text(json.dumps({"card": {"data": [record | {"split": split}]}}))
    assert found(judge, reward_model=training)[0]["rows"] == "unknown"
    assert found(RewardModelJudge(folder, trained_on=pairs(7)), trained_on=moved)[0]["rows"] == "independent"


def test_the_digest_of_no_data_says_nothing(reward_folder, tmp_path):
    folders = [reward_folder(name, pairs(n), seed=n) for n, name in enumerate(("judge", "training"))]
    for folder in folders:
        (tmp_path / f"{folder.name}.jsonl").unlink()
        empty = {"role": "comparisons", "sha256": content_digest(tmp_path / "nothing", DATA_SUFFIXES)}
        (folder / "report.json").write_text(json.dumps({"card": {"data": [empty]}}))
    assert found(RewardModelJudge(folders[0]), reward_model=folders[1])[0]["rows"] == "unknown"


def test_two_models_of_the_same_dataset_of_the_hub_are_refused(reward_folder):
    judge = RewardModelJudge(reward_folder("judge", dataset="org/data"))
    training = reward_folder("training", dataset="org/data", seed=1)
    assert "same dataset org/data (train)" in refusal(judge, reward_model=training)
    other = reward_folder("other", dataset="org/other", seed=2)
    assert found(judge, reward_model=other)[0]["rows"] == "unknown"


def test_rows_are_given_as_files_rows_or_a_dataset(reward_folder, tmp_path):
    training = reward_folder("training", pairs(9), seed=1)
    files = [write(tmp_path / f"part{n}.jsonl", pairs(n)) for n in (1, 2)]
    for trained_on in (files, pairs(1, 2), Dataset.from_list(pairs(1, 2))):
        judge = RewardModelJudge(tmp_path / "nowhere", trained_on=trained_on)
        assert "trained on 2 pairs" in found(judge, reward_model=training)[1]
    with pytest.raises(UserError, match="trained_on of mine.*missing.jsonl"):
        found(RewardModelJudge("x", "mine", trained_on=tmp_path / "missing.jsonl"), reward_model=training)


def test_people_are_independent_unless_they_judged_the_training_rows(tmp_path):
    people = PeopleJudge(tmp_path, ["anna", "tom"])
    assert found(people, functions=[cheerful])[0] == {"rows": "independent"}
    (row,) = pairs(1)
    row["votes"] = [{"annotator": "anna", "pair": [0, 1], "target": 1.0}]
    statuses, text = found(people, trained_on=[row])
    assert statuses == {"rows": "unknown"} and text.startswith("anna also judged")


def test_several_training_rewards_are_all_checked():
    rewards = [TrainingReward(functions=[short]), TrainingReward("second", functions=[cheerful])]
    with pytest.raises(UserError, match="with second"):
        check_independence([ScoreJudge(GoldReward())], rewards)
    assert len(check_independence([PairwiseJudge(nautical)], rewards)) == 2
