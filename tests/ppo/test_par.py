"""`reward_shaping="par"`: scores compared with those of reference answers, of a column or of the reference policy."""

import logging
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerState

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.references import answers_of
from hf_rlhf_ext.reward.scorer import RewardScorer

PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]
PAR = {"reward_shaping": "par", "num_reference_answers": 2}
COLUMN = {"reward_shaping": "par", "reference_answers": "answer"}
ONE = {"max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "num_ppo_epochs": 1, "num_mini_batches": 1}


def score_of(text):
    return text.count("e") - 0.2 * len(text)


class Recorder:
    """A reward function that keeps what it is called with."""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, log_metric, log_extra, **columns):
        log_metric("my/length", len(completions))
        log_extra("my_column", [0] * len(completions))
        random.random()  # one that draws random numbers
        self.calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids})
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [score_of(text) for text in texts]


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log and "objective/scores" in log]


def sigmoid(x):
    return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))


def with_answers(answers, prompts=PROMPTS):
    return Dataset.from_dict({"prompt": list(prompts), "answer": list(answers)})


# Answers of a column

TEXTS = [["seen", "a"], ["eee"], ["the end", "free", "b"], ["me", "he"], ["tree"], ["words"]]


def par_by_hand(call, answers):
    """PAR of the completions of a call, from the scores of the answers of their prompts."""
    found = []
    for prompt, completion in zip(call["prompts"], call["completions"], strict=True):
        score = score_of(completion)
        wanted = [sigmoid(score - score_of(answer)) for answer in answers[PROMPTS.index(prompt)]]
        found.append(sum(wanted) / len(wanted))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "head"},
        {"critic": "adapter", "max_tokens_per_batch": 40},
        {"critic": "model", "peft_config": None},
        {"critic": "none", "num_generations": 4, "per_device_train_batch_size": 8},
    ],
)
def test_the_reward_is_the_probability_of_being_preferred_to_the_answers(make_trainer, options):
    recorder = Recorder()
    trainer = make_trainer(reward_funcs=recorder, train_dataset=with_answers(TEXTS), kl_coef=0.0, **COLUMN, **options)
    before = trained(trainer)
    trainer.train()
    completions, answers = recorder.calls[0], recorder.calls[1]
    assert set(completions["prompts"]) <= set(answers["prompts"])
    wanted = [text for prompt in dict.fromkeys(answers["prompts"]) for text in TEXTS[PROMPTS.index(prompt)]]
    assert answers["completions"] == wanted
    log = logs_of(trainer)[0]
    wanted = par_by_hand(completions, TEXTS)
    assert log["objective/par"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert log["objective/rlhf_reward"] == pytest.approx(log["objective/par"], abs=1e-6)
    scores = [score_of(text) for text in completions["completions"]]
    assert log["objective/scores"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)  # unshaped
    assert any(not torch.equal(weight, before[name]) for name, weight in trained(trainer).items())


def test_answers_are_scored_once_and_logged_nowhere(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(
        reward_funcs=recorder, train_dataset=with_answers(TEXTS), **COLUMN, **(ONE | {"max_steps": 5})
    )
    trainer.train()
    # Blocks of 4 prompts: both are needed by the second rollout, and none afterward.
    sizes = [len(call["completions"]) for call in recorder.calls]
    assert sum(sizes) == 5 * 4 + sum(map(len, TEXTS)) and len(sizes) == 5 + 2
    assert {log["my/length"] for log in logs_of(trainer)} == {4.0}  # of rollouts only


def test_par_acts_on_the_weighted_sum_and_before_the_other_shaping(make_trainer):
    def constant(completions, **columns):
        return [1.0] * len(completions)

    def letters(completions, **columns):
        return [score_of(text) for text in completions]

    seen = []

    def spy(completions, prompts, **columns):
        seen.append((prompts, completions))
        return [0.0] * len(completions)

    trainer = make_trainer(
        reward_funcs=[letters, constant, spy],
        reward_weights=[0.5, 3.0, 1.0],
        train_dataset=with_answers(TEXTS),
        reward_scale=4.0,
        kl_coef=0.0,
        **COLUMN,
        **ONE,
    )
    trainer.train()
    prompts, completions = seen[0]
    wanted = []
    for prompt, completion in zip(prompts, completions, strict=True):
        texts = TEXTS[PROMPTS.index(prompt)]
        # The constant is in both, so that it cancels.
        wanted.append(sum(sigmoid(0.5 * (score_of(completion) - score_of(text))) for text in texts) / len(texts))
    (log,) = logs_of(trainer)
    assert log["objective/par"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert log["objective/rlhf_reward"] == pytest.approx(4 * log["objective/par"], abs=1e-5)


@pytest.mark.parametrize("as_messages", [True, False])
def test_answers_to_messages_reach_the_reward_as_completions_do(make_trainer, as_messages):
    recorder = Recorder()
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    answers = ["seen", "eee", "free", "me", "tree", "words"]
    column = [[{"role": "assistant", "content": text}] for text in answers] if as_messages else answers
    dataset = Dataset.from_list([{"prompt": p, "answer": a} for p, a in zip(prompts, column, strict=True)])
    trainer = make_trainer(reward_funcs=recorder, train_dataset=dataset, **COLUMN, **ONE)
    trainer.train()
    found = recorder.calls[1]
    pairs = {}
    for prompt, completion in zip(found["prompts"], found["completions"], strict=True):
        assert completion[0]["role"] == "assistant"
        pairs[prompt[0]["content"]] = completion[0]["content"]
    assert len(pairs) == 4 and pairs.items() <= dict(zip(PROMPTS, answers, strict=True)).items()
    stop = trainer.processing_class.eos_token_id
    assert all(ids[-1] == stop for ids in found["ids"])


def test_what_is_an_answer():
    message = [{"role": "assistant", "content": "yes"}]
    assert answers_of("yes") == ["yes"]
    assert answers_of(["yes", "no"]) == ["yes", "no"]
    assert answers_of(message) == [message]
    assert answers_of([message, message]) == [message, message]
    for wrong in (None, "", " ", [], ["yes", ""], ["yes", None], 3, [3]):
        assert answers_of(wrong) == []


@pytest.mark.parametrize(
    "dataset, told",
    [
        (Dataset.from_dict({"prompt": PROMPTS}), r"reference_answers='answer'.*no such column"),
        (with_answers([["yes"]] * 3 + [[]] + [["yes"]] * 2), r"row 3: `answer` is \[\].*fix or drop"),
        (with_answers(["yes"] * 5 + [None]), "row 5: `answer` is None"),
    ],
)
def test_a_column_without_answers_is_refused_before_training(make_trainer, dataset, told):
    with pytest.raises(UserError, match=told) as error:
        make_trainer(train_dataset=dataset, **COLUMN)
    assert "\n" not in str(error.value)


# Answers of the reference policy


@pytest.mark.parametrize("kind", ["new adapter", "adapter", "model", "virtual tokens"])
def test_answers_are_samples_of_the_reference(make_trainer, tiny_config, lora, kind):
    """Greedy ones, token by token from forward passes, while the policy has moved away."""
    options = {}
    if kind == "model":
        options = {"peft_config": None}
    elif kind == "virtual tokens":
        options = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    elif kind == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(tiny_config), lora)
        with torch.no_grad():  # as after SFT: the reference is not the base
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        options = {"model": model, "peft_config": None}
    trainer = make_trainer(top_k=1, **PAR, **ONE, **options)
    with torch.no_grad():  # the policy moves away, and the reference does not
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    references = trainer.experience.references
    _, prompt_ids = references.prompts.rows(range(4))
    with torch.no_grad(), trainer.roles.activate("reference") as model:
        wanted = []
        for ids in prompt_ids:
            tokens = list(ids)
            while len(tokens) < len(ids) + 6 and (len(tokens) == len(ids) or tokens[-1] % 5):
                logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
                tokens.append(int(logits.argmax()))
            wanted += [tokens[len(ids) :]] * 2
    assert references._sample(prompt_ids) == wanted
    trainer.tools.sync()
    assert trainer.tools.sample(prompt_ids, n=2).ids != wanted


@pytest.mark.parametrize("seed", [0, 3])
def test_answers_are_not_the_completions_of_the_first_rollout(make_trainer, seed):
    """They have random numbers of their own, also with the seed 0."""
    recorder = Recorder()
    options = PAR | ONE | {"num_reference_answers": 1, "seed": seed}
    make_trainer(reward_funcs=recorder, **options).train()
    completions, answers = recorder.calls
    # The policy begins as the reference, and the first block is the first rollout.
    assert completions["prompts"] == answers["prompts"]
    assert sum(own != other for own, other in zip(completions["ids"], answers["ids"], strict=True)) >= 3


def test_blocks_and_seeds_have_different_random_numbers(make_trainer):
    """Two blocks of the same prompt, in runs with two seeds."""
    same = Dataset.from_dict({"prompt": ["Tell me"] * 8})
    blocks = []
    for seed in (0, 1):
        trainer = make_trainer(folder=str(seed), train_dataset=same, seed=seed, **PAR, **ONE)
        references = trainer.experience.references
        references.of(list(range(8)), TrainerState())
        for block in (0, 1):
            blocks.append([references._known[row] for row in references._rows_of(block)])
    for number, block in enumerate(blocks):
        assert block not in blocks[:number]


@pytest.mark.parametrize("generations", [1, 4])
def test_answers_are_the_same_for_the_whole_run_and_after_resuming(make_trainer, generations):
    options = PAR | SAVED | {"num_generations": generations, "per_device_train_batch_size": 4}
    first, second = Recorder(), Recorder()
    whole = make_trainer(reward_funcs=first, **options)
    whole.train()
    resumed = make_trainer(reward_funcs=second, **options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(resumed)[name]), name
    wanted = [log["objective/par"] for log in logs_of(whole)][4:]
    assert [log["objective/par"] for log in logs_of(resumed)][-4:] == wanted and len(wanted) == 4
    known = whole.experience.references._known
    for row, scores in resumed.experience.references._known.items():
        assert scores == known[row]
    assert len(set(map(tuple, known.values()))) > 3


def test_a_long_wait_after_resuming_is_said(make_trainer, caplog):
    many = Dataset.from_dict({"prompt": [f"Tell me {word}" for word in "abcdefghijklmnopqrst"]})
    options = PAR | SAVED | {"train_dataset": many, "max_steps": 8, "save_steps": 6}
    whole = make_trainer(**options)
    whole.train()  # 5 rollouts are a pass
    assert "reference answers of" not in caplog.text
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    (line,) = [line for line in caplog.messages if "reference answers of" in line]
    assert "prompts are sampled and scored for this rollout" in line
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(resumed)[name]), name


class Noisy:
    """A reward with random numbers of Python, which may send a signal in one of its calls."""

    __name__ = "noisy"

    def __init__(self, call=None):
        self.call, self.calls = call, 0

    def __call__(self, completions, **columns):
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGTERM)
        return [score_of(text) + random.random() for text in completions]


def test_a_signal_while_answers_are_scored_loses_nothing(make_trainer):
    options = PAR | SAVED | {"save_steps": 100, "max_steps": 4}
    straight = make_trainer(folder="straight", reward_funcs=Noisy(), **options)
    random.seed(5)
    straight.train()
    # Completions, answers, completions, answers.
    stopped = make_trainer(reward_funcs=Noisy(call=4), **options)
    random.seed(5)
    with pytest.raises(SystemExit):
        stopped.train()
    assert stopped.state.global_step == 1
    resumed = make_trainer(reward_funcs=Noisy(), **options)
    random.seed(77)  # another process
    resumed.train(resume_from_checkpoint=True)
    for name, weight in trained(straight).items():
        assert torch.equal(weight, trained(resumed)[name]), name


def test_sampling_them_changes_no_random_state(make_trainer):
    trainer = make_trainer(reward_funcs=Recorder(), **PAR, **ONE)
    random.seed(5)
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    scores = trainer.experience.references.of([0, 3, 3], TrainerState())
    assert scores.shape == (3, 2) and torch.equal(scores[1], scores[2])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_the_completions_are_those_of_a_run_without_shaping(make_trainer):
    shaped, plain = Recorder(), Recorder()
    make_trainer(folder="shaped", reward_funcs=shaped, **PAR, **ONE).train()
    make_trainer(folder="plain", reward_funcs=plain, **ONE).train()
    assert shaped.calls[0]["ids"] == plain.calls[0]["ids"]
    assert len(shaped.calls[1]["ids"]) == 2 * 4  # two answers for each prompt of the block


def test_a_reward_adapter_scores_both(make_trainer, tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config.__class__(**(tiny_config.to_dict() | {"num_labels": 1})))
    scorer = RewardScorer(model, chat_tokenizer)
    options = {"num_generations": 2, "critic": "adapter"}
    trainer = make_trainer(reward_funcs=scorer, **options, **PAR, **ONE)
    trainer.train()
    (log,) = logs_of(trainer)
    assert 0 < log["objective/par"] < 1 and log["objective/reference_scores"] != 0


# Around it


def test_evaluations_report_scores_without_shaping(make_trainer, prompts):
    options = {"eval_dataset": prompts, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "objective/scores"}
    options |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(**PAR, **ONE, **options)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "eval_objective/scores" in log)
    assert not 0 <= log["eval_objective/scores"] <= 1  # a text of a few letters has less than nothing
    assert not {"eval_objective/par", "eval_objective/reference_scores"} & log.keys()
    assert trainer.state.best_metric == log["eval_objective/scores"]


def test_token_rewards_are_refused(make_trainer):
    def per_token(completion_ids, **columns):
        return [[0.1] * len(ids) for ids in completion_ids]

    with pytest.raises(UserError, match="reward_shaping='par'.*token rewards"):
        make_trainer(reward_funcs=per_token, **PAR, **ONE).train()


def test_what_is_compared_is_said(make_trainer, caplog):
    caplog.set_level(logging.INFO)
    make_trainer(**PAR)
    make_trainer(train_dataset=with_answers(TEXTS), **COLUMN)
    first, second = [line for line in caplog.messages if "reference answers" in line]
    assert "2 for each prompt" in first and "column 'answer'" in second


@pytest.mark.parametrize(
    "options, told",
    [
        ({"reference_answers": "answer"}, "reference_answers.*set reward_shaping to par"),
        ({"num_reference_answers": 2}, "num_reference_answers.*set reward_shaping to par"),
        (COLUMN | {"num_reference_answers": 2}, "num_reference_answers=2.*none are sampled"),
        (PAR | {"num_reference_answers": 0}, "num_reference_answers"),
        ({"reward_shaping": "sigmoid"}, "reward_shaping must be one of par"),
    ],
)
def test_options_that_do_nothing_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        PPOConfig("x", use_cpu=True, bf16=False, **options)
