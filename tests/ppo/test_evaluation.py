"""Evaluation in training: the best model, what reward functions log, tables of completions, several sets, sampling."""

import logging
import math
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from hf_rlhf_ext.errors import UserError


def evaluated(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def test_the_best_model_is_that_of_the_highest_score_where_no_metric_is_named(make_trainer, prompts):
    trainer = make_trainer(eval_dataset=prompts, load_best_model_at_end=True, **EVERY_STEP)
    trainer.train()
    scores = evaluated(trainer, "eval_objective/scores")
    assert len(scores) == 4 and trainer.state.best_metric == max(scores)
    assert trainer.state.best_global_step == 1 + scores.index(max(scores))


def test_a_figure_that_is_not_finite_bars_the_best_model_only_where_it_decides(make_trainer, prompts, caplog):
    def gold(prompts, **kwargs):
        return [None] * len(prompts)  # scored nothing: its mean is NaN

    options = {"eval_dataset": prompts, "eval_reward_funcs": [gold, lambda prompts, **_: [1.0] * len(prompts)]}
    trainer = make_trainer(load_best_model_at_end=True, max_steps=2, **options, **EVERY_STEP)
    trainer.train()
    assert math.isnan(evaluated(trainer, "eval_rewards/gold/mean")[0])
    assert trainer.state.best_metric == max(evaluated(trainer, "eval_objective/scores"))
    trainer.args.metric_for_best_model = "rewards/gold/mean"
    assert not trainer._determine_best_metric({"eval_rewards/gold/mean": math.nan, "eval_objective/kl": 1.0}, None)
    far = {"eval_easy_objective/kl": 1.0, "eval_hard_objective/kl": 101.0, "eval_rewards/gold/mean": 1e9}
    assert not trainer._determine_best_metric(far, None)  # one of two sets is above max_kl
    with pytest.raises(UserError, match="metric_for_best_model: .* no 'eval_rewards/gold/mean': choose one"):
        trainer._determine_best_metric({"eval_objective/kl": 1.0}, None)


def test_of_several_sets_one_must_be_named(make_trainer, prompts):
    sets = {"easy": prompts, "hard": prompts.select([0])}
    with pytest.raises(UserError, match="metric_for_best_model: .* add the name of one, as in easy_objective/scores."):
        make_trainer(eval_dataset=sets, load_best_model_at_end=True, **EVERY_STEP)
    trainer = make_trainer(
        eval_dataset=sets,
        load_best_model_at_end=True,
        metric_for_best_model="hard_objective/scores",
        max_steps=2,
        **EVERY_STEP,
    )
    trainer.train()
    assert trainer.state.best_metric == max(evaluated(trainer, "eval_hard_objective/scores"))


def words(completions, log_metric, log_extra, **kwargs):
    log_metric("letters", sum(map(len, completions)) / len(completions))
    log_extra("first", [text[:1] for text in completions])
    return [float(len(text)) for text in completions]


def judge(completions, log_metric, log_extra, **kwargs):
    log_metric("judged", float(len(completions)))
    return [0.0] * len(completions)


def test_what_rewards_log_reaches_training_and_evaluation(make_trainer, prompts, capsys):
    trainer = make_trainer(
        reward_funcs=words,
        eval_reward_funcs=judge,
        eval_dataset=prompts,
        max_steps=1,
        per_device_eval_batch_size=4,
        log_completions=True,
        num_completions_to_print=2,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["letters"] == pytest.approx(log["rewards/words/mean"])
    metrics = trainer.evaluate()
    assert metrics["eval_letters"] == pytest.approx(metrics["eval_rewards/words/mean"])
    assert metrics["eval_judged"] == pytest.approx((4 * 4 + 2 * 2) / 6)  # batches of four and two
    rows = trainer.sample_and_score(prompts)
    assert [row.extra["first"] for row in rows] == [row.completion[:1] for row in rows]
    shown = capsys.readouterr().out
    assert shown.count("words") >= 2 and "first" in shown and "judge" in shown and "kl" in shown


def test_an_extra_column_of_the_wrong_length_is_one_line(make_trainer):
    def short(completions, log_extra, **kwargs):
        log_extra("first", ["a"])
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"log_extra\('first'\): 1 values for 8 completions: give one for each."):
        make_trainer(reward_funcs=short).train()


def texts_in(folder):
    """Texts by tag and step of TensorBoard's event files: records of length, its checksum, bytes, their checksum."""
    found = {}
    for path in Path(folder).rglob("*tfevents*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                if value.tensor.string_val:
                    found[value.tag.removesuffix("/text_summary"), event.step] = value.tensor.string_val[0].decode()
    return found


def test_completions_of_training_and_evaluation_go_to_tensorboard(make_trainer, prompts, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "logging_steps": 4}
    trainer = make_trainer(
        report_to="tensorboard", reward_funcs=words, eval_dataset=prompts, log_completions=True, **options
    )
    trainer.train()
    found = texts_in(trainer.args.output_dir)
    tables = {key: text for key, text in found.items() if "completions" in key[0]}
    assert set(tables) == {("eval_completions", 2), ("eval_completions", 4), ("completions", 4)}
    table = tables["eval_completions", 4]
    for cell in ("step", "prompt", "completion", "words", "kl", "first", *prompts["prompt"]):
        assert f">{cell}</t" in table
    rows = trainer.sample_and_score(prompts)  # the seed of the evaluation, the weights of the last step
    assert all(f"<td>{row.kl:.6f}</td>" in table for row in rows)


def test_the_evaluation_before_the_first_rollout_is_remembered(make_trainer, prompts, caplog, history_of):
    golds = iter([5.0, 4.0, 3.0, 2.0, 1.0])
    rising = iter(range(100))

    def gold(prompts, **kwargs):
        return [next(golds)] * len(prompts)

    def proxy(prompts, **kwargs):
        return [float(next(rising))] * len(prompts)

    sets = {"easy": prompts}
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer = make_trainer(
            reward_funcs=proxy,
            eval_dataset=sets,
            eval_reward_funcs=gold,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=4,
            per_device_eval_batch_size=8,
            max_steps=16,
        )
        trainer.train()
    history = history_of(trainer)
    assert history[0]["eval_easy_rewards/gold/mean"] == 5.0 and len(history) == 5
    assert "gold fell from its best 5 to 3 in evaluation on easy while the training reward rose" in caplog.text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"generation_kwargs": {"min_p": 0.1}}, "min_p=0.1: tokens are sampled from another distribution"),
        ({"top_k": 9, "generation_kwargs": {"repetition_penalty": 1.2}}, "top_k=9, repetition_penalty=1.2: tokens"),
        ({"generation_kwargs": {"suppress_tokens": [3]}}, "suppress_tokens=[3]: tokens"),
        ({"generation_kwargs": {"typical_p": 0.9}, "importance_sampling_correction": True}, ""),
        ({"generation_kwargs": {"repetition_penalty": 1.0, "min_p": 0.0, "use_cache": False}}, ""),
    ],
)
def test_generation_options_that_change_the_distribution_are_named(make_trainer, caplog, options, said):
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        make_trainer(**options)
    assert said in caplog.text and bool(said) == ("another distribution" in caplog.text)
