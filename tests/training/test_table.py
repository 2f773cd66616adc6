"""The table of a run: its columns and rows from the logs that trainers write."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

import hf_rlhf_ext
from hf_rlhf_ext.training.shown_table import has_table, show_table
from hf_rlhf_ext.training.table import (
    LOGS_READ,
    MAX_ROWS,
    PPO_COLUMNS,
    REWARD_MODEL_COLUMNS,
    SFT_COLUMNS,
    table_html,
    table_of,
)

PPO_LOG = {"loss": 0.1, "objective/scores": 0.4567, "objective/kl": 1.234, "completions/mean_length": 17.25, "step": 1}
PPO_EVALUATION = {
    "eval_objective/scores": -0.5,
    "eval_objective/kl": 2.0,
    "eval_completions/mean_length": 16.0,
    "eval_runtime": 3.0,
    "step": 1,
}


def cells(table, row: int = 0) -> dict[str, str]:
    return dict(zip(table.headings, table.rows[row], strict=True))


def test_ppo_shows_reward_kl_and_length_and_not_the_loss():
    table = table_of([PPO_LOG], PPO_COLUMNS)
    assert cells(table) == {"Step": "1", "Reward": "0.457", "KL (nats)": "1.23", "Length (tokens)": "17.2"}


def test_an_evaluation_is_in_the_row_of_its_step():
    table = table_of([PPO_LOG, PPO_EVALUATION, PPO_LOG | {"step": 2}], PPO_COLUMNS)
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert cells(table)["Eval reward"] == "-0.500" and cells(table)["Eval KL (nats)"] == "2.00"
    assert cells(table, 1)["Eval reward"] == "" and cells(table, 1)["Reward"] == "0.457"


def test_several_rewards_have_a_column_each_and_one_has_none():
    one = {"rewards/short/mean": -0.2}
    assert "short" not in table_of([PPO_LOG | one], PPO_COLUMNS).headings
    table = table_of([PPO_LOG | one | {"rewards/rm/mean": 0.75, "rewards/rm/std": 1.0}], PPO_COLUMNS)
    assert table.headings[:4] == ["Step", "Reward", "short", "rm"] and cells(table)["rm"] == "0.750"


def test_the_accuracy_of_an_evaluation_has_its_interval():
    logs = [
        {"loss": 0.7, "accuracy": 0.5, "step": 4},
        {"eval_loss": 0.6, "eval_accuracy": 0.75, "eval_accuracy_low": 0.5, "eval_accuracy_high": 1.0, "step": 4}
        | {"eval_runtime": 1.0},
    ]
    found = cells(table_of(logs, REWARD_MODEL_COLUMNS))
    assert found["Accuracy"] == "0.500" and found["Eval accuracy"] == "0.750 (0.500 to 1.00)"


def test_each_evaluation_set_has_columns_of_its_own():
    sets = [
        {"eval_hard_set_accuracy": 0.5, "eval_hard_set_my_accuracy": 0.1, "eval_hard_set_runtime": 1.0, "step": 1},
        {"eval_easy_accuracy": 1.0, "eval_easy_runtime": 1.0, "step": 1},
        {"test_accuracy": 0.25, "test_runtime": 1.0, "step": 1},
    ]
    found = cells(table_of(sets, REWARD_MODEL_COLUMNS))
    assert found == {
        "Step": "1",
        "Eval accuracy [hard_set]": "0.500",
        "Eval accuracy [easy]": "1.00",
        "Test accuracy": "0.250",
    }


def test_the_summary_and_logs_without_these_metrics_have_no_row():
    logs = [{"train_loss": 1.0, "train_runtime": 9.0, "step": 2}, {"grad_norm": 1.0, "step": 2}]
    assert table_of(logs, SFT_COLUMNS).rows == []


def test_only_steps_of_this_process_have_a_time():
    """A resumed run shows the logs of its earlier part, too."""
    table = table_of([PPO_LOG, PPO_LOG | {"step": 2}], PPO_COLUMNS, {2: 3725.0})
    assert [row[-1] for row in table.rows] == ["", "1:02:05"] and table.headings[-1] == "Time"


def test_a_long_run_shows_its_last_rows_and_says_where_the_others_are():
    table = table_of([PPO_LOG | {"step": step} for step in range(MAX_ROWS + 7)], PPO_COLUMNS)
    assert len(table.rows) == MAX_ROWS and table.rows[0][0] == "7"
    assert "The 7 earlier logs" in table_html(table)
    table = table_of([PPO_LOG | {"step": step} for step in range(LOGS_READ + 7)], PPO_COLUMNS)
    assert len(table.rows) == MAX_ROWS and table.left_out == LOGS_READ + 7 - MAX_ROWS


def test_names_are_escaped():
    name = "<img src=x onerror=alert(1)>"
    page = table_html(table_of([PPO_LOG | {f"rewards/{name}/mean": 1.0, "rewards/b/mean": 2.0}], PPO_COLUMNS))
    assert "<img" not in page and "&lt;img" in page


@pytest.mark.parametrize("value, text", [(None, "None"), ("high", "high"), (float("nan"), "nan")])
def test_values_that_are_not_numbers_are_shown_as_they_are(value, text):
    assert cells(table_of([{"loss": value, "step": 1}], SFT_COLUMNS))["Loss"] == text


def test_the_columns_are_logged_names():
    """A renamed metric must not disappear from the table."""
    from hf_rlhf_ext.metrics.names import METRICS

    of_trl = {"mean_token_accuracy"}
    names = {column.metric for column in (*PPO_COLUMNS, *REWARD_MODEL_COLUMNS, *SFT_COLUMNS)}
    assert names - of_trl <= set(METRICS)


# Trainers


class OneWeight(nn.Module):
    """A model with one weight and a loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, labels):
        return {"loss": ((self.weight * x - labels) ** 2).mean(), "logits": self.weight * x}


@pytest.fixture
def trainer(tmp_path):
    """Makes a Transformers trainer with the callback that it adds in a notebook, or without it."""

    def make(in_notebook: bool, **options) -> Trainer:
        from transformers.utils.notebook import NotebookProgressCallback

        args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, **options)
        rows = [{"x": float(i), "labels": 0.0} for i in range(4)]
        made = Trainer(OneWeight(), args, train_dataset=rows, eval_dataset=rows)
        made.remove_callback(ProgressCallback)
        if in_notebook:
            made.add_callback(NotebookProgressCallback())
        return made

    return make


def test_the_table_takes_the_place_of_that_of_transformers(trainer):
    from transformers.utils.notebook import NotebookProgressCallback

    made = trainer(in_notebook=True, logging_steps=1, eval_strategy="steps", eval_steps=2)
    show_table(made, SFT_COLUMNS)
    assert has_table(made)
    tables = [one for one in made.callback_handler.callbacks if isinstance(one, NotebookProgressCallback)]
    assert len(tables) == 1 and type(tables[0]) is not NotebookProgressCallback
    for _ in range(2):  # a second call of `train` begins again
        made.train()
    assert "eval_runtime" in made.evaluate()  # outside of `train`
    made.remove_callback(NotebookProgressCallback)
    assert not has_table(made)


def test_where_transformers_has_no_table_there_is_none(trainer):
    made = trainer(in_notebook=False, disable_tqdm=True)
    before = list(made.callback_handler.callbacks)
    show_table(made, SFT_COLUMNS)
    assert made.callback_handler.callbacks == before and not has_table(made)


@pytest.mark.parametrize(
    "module, columns",
    [("ppo/trainer.py", "PPO_COLUMNS"), ("reward/trainer.py", "REWARD_MODEL_COLUMNS"), ("hub/sft.py", "SFT_COLUMNS")],
)
def test_each_trainer_shows_its_columns(module, columns):
    source = (Path(hf_rlhf_ext.__file__).parent / module).read_text(encoding="utf-8")
    assert source.count(f"show_table(self, {columns})") == 1
