"""What TRL's last PPO trainer (1.12) got wrong, one test each.

Some are tested where they belong: one base instead of four models (modeling/test_stack.py, ppo/test_roles.py), adaptive
KL, gradient checkpointing that is on, small data sets, evaluation that returns metrics, generation that ends at a stop
token and clipping per role (ppo/test_trainer.py), bf16 (ppo/test_precision.py), whitening over all processes
(ppo/test_distributed.py), critics that are saved and exact resume (ppo/test_resume.py).
"""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback


def test_logits_never_exist_for_more_than_a_chunk_of_tokens(make_trainer):
    trainer = make_trainer(logprobs_chunk_size=3, merge_for_generation=False, max_steps=2)
    seen = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1]))
    trainer.train()
    sizes = [shape.numel() for shape in seen]
    assert max(sizes) <= 8  # generation: one position of each of the 8 prompts; otherwise chunks of 3, one row a pass
    assert sum(shape.numel() <= 3 for shape in seen) > len(seen) / 2


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_mini_batches_are_optimizer_steps_on_rows_of_their_own(make_trainer, mini_batches):
    rows, steps = [], []

    class Count(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            steps.append(len(rows))

    trainer = make_trainer(
        per_device_train_batch_size=8 // mini_batches,
        num_mini_batches=mini_batches,
        num_ppo_epochs=1,
        max_steps=mini_batches,
        callbacks=[Count()],
    )
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: (batch := prepare(inputs), rows.extend(batch.rows.tolist()))[0]
    trainer.train()
    assert steps == [8 // mini_batches * (k + 1) for k in range(mini_batches)] and sorted(rows) == list(range(8))


def test_the_missing_stop_penalty_is_about_the_stop_token_not_eos(make_trainer, chat_tokenizer):
    stops = [token for token in range(5, 384, 7) if token != chat_tokenizer.eos_token_id]
    seen = {}

    def reward(completion_ids, **kwargs):
        seen["ids"] = completion_ids
        return [0.0] * len(completion_ids)

    trainer = make_trainer(reward_funcs=reward, stop_token_ids=stops, missing_eos_penalty=3.0, kl_coef=0.0, max_steps=1)
    trainer.train()
    unfinished = sum(ids[-1] not in stops for ids in seen["ids"])
    assert 0 < unfinished < 8 and not any(chat_tokenizer.eos_token_id == ids[-1] for ids in seen["ids"])
    assert trainer.state.log_history[0]["objective/rlhf_reward"] == pytest.approx(-3.0 * unfinished / 8)


def test_a_pad_token_that_is_also_eos_hides_no_end(make_trainer, chat_tokenizer):
    logs = []
    for pad in (chat_tokenizer.pad_token, chat_tokenizer.eos_token):
        chat_tokenizer.pad_token = pad
        eos = [chat_tokenizer.eos_token_id]
        bias = [[eos, 4.0]]  # half of the completions end
        trainer = make_trainer(stop_token_ids=eos, generation_kwargs={"sequence_bias": bias}, max_completion_length=12)
        trainer.train()
        logs.append(trainer.state.log_history)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        logs.append(weights)
    assert 0 < logs[0][0]["completions/stopped_frac"] < 1 and logs[0][0]["val/num_eos_tokens"] > 0
    assert logs[0][0]["completions/mean_length"] == logs[2][0]["completions/mean_length"]
    assert all(torch.equal(logs[1][name], logs[3][name]) for name in logs[1])


def test_the_score_lands_on_the_stop_token_and_not_behind_it(make_trainer):
    trainer = make_trainer(kl_coef=0.0, gamma=0.5, gae_lambda=1.0, whiten_advantages=False, max_steps=1)
    trainer.train()
    rollout = trainer.ppo.rollout
    lengths, returns = rollout.completion_lengths, rollout.returns
    last = returns.gather(1, (lengths - 1)[:, None])
    assert (last.abs() > 0).all() and len(set(lengths.tolist())) > 2
    for row, length in enumerate(lengths.tolist()):  # discounted by one step a token from there
        expected = last[row] * 0.5 ** torch.arange(length - 1, -1, -1)
        torch.testing.assert_close(returns[row, :length], expected)
        assert not returns[row, length:].any()


def test_sampling_that_differs_from_scoring_is_said(make_trainer, caplog):
    def said(**options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext.ppo.prompts"):
            make_trainer(**options)
        return caplog.text

    line = said(top_k=20, top_p=0.9)
    assert "top_k=20, top_p=0.9: tokens are sampled from another distribution than the one that is scored" in line
    assert "importance_sampling_correction" in line
    assert not said() and not said(temperature=0.7) and not said(top_k=20, importance_sampling_correction=True)


def test_the_sampling_mismatch_is_zero_in_fp32_and_shows_top_k(make_trainer):
    mismatch = []
    for options in ({}, {"temperature": 0.7}, {"top_k": 5}):
        trainer = make_trainer(max_steps=1, **options)
        trainer.train()
        mismatch.append(trainer.state.log_history[0]["sampling/logprob_mismatch"])
    assert mismatch[0] == pytest.approx(0.0, abs=1e-5) and mismatch[1] == pytest.approx(0.0, abs=1e-5)
    assert mismatch[2] > 2.0  # 5 of 384 tokens: about log(384 / 5)


def test_a_table_of_completions_goes_to_trackers_that_have_tables(make_trainer, monkeypatch):
    import sys
    import types

    sent = []
    tracker = types.SimpleNamespace(run=object(), Table=lambda dataframe: dataframe, log=sent.append)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    trainer = make_trainer(max_steps=1, log_completions=True, train_dataset=Dataset.from_dict({"prompt": ["fox"] * 3}))
    trainer.args.report_to = ["wandb"]
    trainer.train()
    table = sent[0]["completions"]
    assert list(table.columns) == ["step", "prompt", "completion", "letter_reward"] and len(table) == 8
    assert set(table["prompt"]) == {"fox"}
