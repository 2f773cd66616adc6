"""Best-of-n samples, scores and chooses; a killed run goes on to the same result; its rows train SFT and DPO."""

import copy
import json
import linecache
import math
import os
import signal

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import hf_rlhf_ext
from hf_rlhf_ext import RewardScorer, load_comparisons, load_demonstrations
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import encode_generation_prompt
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.engine import Samples, TransformersEngine
from hf_rlhf_ext.study.best_of_n import BestOfN, best_of_n
from hf_rlhf_ext.study.best_of_n_file import OtherSettings

TEXTS = ["Tell me about a sunny day.", "Numbers:", "The quick brown fox", "sad", "many words, many"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
OPTIONS = {"max_new_tokens": 6, "batch_size": 8}


def letters(completions, **columns):
    """How many small letters an answer has."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(sum(letter.islower() for letter in text)) for text in texts]


@pytest.fixture
def run(tiny_llama, chat_tokenizer):
    def call(prompts=TEXTS, reward=letters, n=4, **options) -> BestOfN:
        return best_of_n(tiny_llama, prompts, reward, n, tokenizer=chat_tokenizer, **OPTIONS | options)

    return call


class Counting(TransformersEngine):
    """Counts the prompts that it was asked for, and does something before a call."""

    def __init__(self, before=lambda calls: None):
        super().__init__()
        self.calls = 0
        self.before = before

    def generate(self, prompt_ids, sampling, n=1):
        self.before(self.calls)
        self.calls += 1
        return super().generate(prompt_ids, sampling, n=n)


Counting.__name__ = "TransformersEngine"  # an engine of another name is another setting


def test_the_best_and_the_worst_are_those_of_the_reward(run):
    result = run(path=None)
    assert hf_rlhf_ext.best_of_n is best_of_n
    assert result.rows == [0, 1, 2, 3, 4] and result.prompts == TEXTS and not result.dropped
    for place in range(5):
        assert len(result.completions[place]) == len(result.ids[place]) == 4
        rewards = letters(result.completions[place])
        assert result.rewards[place] == rewards
        assert result.winner_rewards[place] == max(rewards)
        assert letters([result.winners[place], result.losers[place]]) == [max(rewards), min(rewards)]
        assert result.best[place] == rewards.index(max(rewards))
    assert len({text for of_prompt in result.texts for text in of_prompt}) > 10


def test_the_log_probabilities_are_those_of_the_policy(run, tiny_llama, chat_tokenizer):
    result = run(prompts=CHATS, temperature=0.7)
    prompt = encode_generation_prompt(chat_tokenizer, CHATS[2])
    ids = result.winner_ids[2]
    with torch.no_grad():
        logits = tiny_llama(torch.tensor([prompt + ids])).logits[0].double() / 0.7
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    expected = logprobs.gather(1, torch.tensor(ids)[:, None]).sum().item()
    assert result.winner_logprobs[2] == pytest.approx(expected, abs=1e-3)


def test_the_same_arguments_give_the_same_and_the_random_state_is_kept(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert run() == first
    assert run(seed=1).ids != first.ids


def test_messages_are_answered_with_messages_and_a_begun_answer_is_completed(run):
    begun = [*CHATS[0], {"role": "assistant", "content": "It is"}]
    result = run(prompts=[*CHATS, begun])
    assert all(completion[0]["role"] == "assistant" for completion in result.winners)
    assert result.prompts[5] == CHATS[0] and result.winners[5][0]["content"].startswith("It is")
    assert result.winners[5][0]["content"] == "It is" + result.texts[5][result.best[5]]


def test_the_reward_gets_the_columns_of_the_rows_and_rows_of_winners_keep_their_category(run):
    seen = []

    def by_answer(prompts, completions, answer, completion_ids, **columns):
        seen.extend(zip(prompts, answer, map(len, completion_ids), strict=True))
        return letters(completions)

    rows = [{"prompt": text, "answer": number, "category": "chat"} for number, text in enumerate(TEXTS)]
    result = run(prompts=rows, reward=by_answer)
    assert {(prompt, answer) for prompt, answer, _ in seen} == {(text, n) for n, text in enumerate(TEXTS)}
    assert result.demonstrations()[1]["category"] == "chat" and "answer" not in result.demonstrations()[1]
    with pytest.raises(UserError, match="needs 'answer'"):
        run(reward=by_answer)


# --- runs that stop --------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_result(run, tmp_path):
    whole = run(path=tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == 10]
    assert len(ends) == 1 + 2 * 3  # five prompts in chunks of two
    # At the end of a line, without its line feed, in the middle of one, and before the first one.
    cuts = {0, 5, *(end + 1 for end in ends), *(end - 7 for end in ends[2:4]), ends[0], ends[3]}
    for cut in sorted(cuts):
        path = tmp_path / f"cut-{cut}.jsonl"
        path.write_bytes(content[:cut])
        torch.rand(3)
        engine = Counting()
        assert run(path=path, engine=engine) == whole
        assert path.read_bytes() == content
        if cut == len(content):
            assert engine.calls == 0


def test_a_killed_process_has_kept_its_chunks(run, tmp_path):
    whole = run()
    path = tmp_path / "samples.jsonl"
    child = os.fork()
    if not child:  # killed in its third chunk
        run(path=path, engine=Counting(lambda calls: os.kill(os.getpid(), signal.SIGKILL) if calls == 2 else None))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    engine = Counting()
    assert run(path=path, engine=engine) == whole and engine.calls == 1


def test_a_reward_that_fails_loses_no_samples_and_another_reward_uses_them(run, tmp_path):
    path = tmp_path / "samples.jsonl"

    def wrong(completions, **columns):
        if len(path.read_text().splitlines()) > 3:
            raise ValueError("no answer")
        return letters(completions)

    with pytest.raises(UserError, match="'wrong' failed: ValueError: no answer"):
        run(reward=wrong, path=path)
    engine = Counting()
    result = run(path=path, engine=engine)
    assert engine.calls == 1 and result == run()

    other = run(
        reward=lambda completions, **columns: [-score for score in letters(completions)], path=path, engine=engine
    )
    assert engine.calls == 1 and other.ids == result.ids
    assert [-reward for reward in other.winner_rewards] == [min(rewards) for rewards in result.rewards]


def test_rewards_of_the_same_source_with_other_values_are_other_rewards(run, tmp_path):
    def times(factor):
        return lambda completions, **columns: [factor * score for score in letters(completions)]

    path = tmp_path / "samples.jsonl"
    first, second = run(reward=times(1.0), path=path), run(reward=times(-1.0), path=path)
    assert second.rewards == [[-reward for reward in rewards] for rewards in first.rewards]
    assert run(reward=[times(1.0), times(-1.0)], path=path, reward_weights=[2, 1]).rewards == first.rewards


def test_rewards_are_computed_again_after_an_edit_of_what_they_call(run, tmp_path):
    path, source = tmp_path / "samples.jsonl", tmp_path / "my_reward.py"

    def reward_of(text):
        source.write_text(text)
        linecache.checkcache(str(source))
        return reward_function(f"{source}:score", "reward_funcs")

    calling = (
        "def of(text):\n    return {0}\n\ndef score(completions, **columns):\n    return list(map(of, completions))\n"
    )
    first = run(reward=reward_of(calling.format("float(len(text))")), path=path)
    second = run(reward=reward_of(calling.format("-1.0 * len(text)")), path=path)
    assert second.rewards == [[-reward for reward in rewards] for rewards in first.rewards]
    pair = [lambda **c: [1.0] * len(c["completions"]), lambda **c: [2.0] * len(c["completions"])]
    assert [run(reward=func, path=path).rewards[0][0] for func in pair] == [1.0, 2.0]


def test_a_reward_that_changes_its_prompts_does_not_change_the_result(run):
    def extends(prompts, completions, **columns):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
        return [float(len(prompt)) for prompt in prompts]

    prompts = [list(chat) for chat in CHATS]
    result = run(prompts=prompts, reward=extends)
    assert result.prompts == CHATS == prompts and result.rewards == [[2.0] * 4] * 5


def test_a_column_of_scores_is_one_score_each(run):
    plain = run()
    column = run(reward=lambda completions, **columns: torch.tensor(letters(completions))[:, None])
    assert column.rewards == plain.rewards


def test_each_part_of_the_policy_keeps_its_mode(run, tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    before = [module.training for module in tiny_llama.modules()]
    run()
    assert [module.training for module in tiny_llama.modules()] == before and len(set(before)) == 2


def test_messages_for_a_reward_model_without_a_chat_template_are_refused_before_sampling(run, scorer):
    scorer.tokenizer = copy.deepcopy(scorer.tokenizer)
    scorer.tokenizer.chat_template = None
    engine = Counting()
    with pytest.raises(UserError, match="no chat template"):
        run(prompts=CHATS, reward=scorer, engine=engine)
    assert engine.calls == 0
    run(prompts=TEXTS[:1], reward=scorer, engine=engine)


@pytest.mark.parametrize(
    "changed, named", [({"n": 8}, "n 4, now it is 8"), ({"temperature": 0.5}, "temperature"), ({"seed": 1}, "seed")]
)
def test_samples_of_other_options_are_not_mixed(run, tmp_path, changed, named):
    run(path=tmp_path / "samples.jsonl")
    with pytest.raises(OtherSettings, match=named):
        run(path=tmp_path / "samples.jsonl", **changed)


def test_samples_of_other_weights_or_prompts_are_not_mixed(run, tmp_path, tiny_llama):
    run(path=tmp_path / "samples.jsonl")
    with pytest.raises(OtherSettings, match="prompts"):
        run(prompts=TEXTS[1:], path=tmp_path / "samples.jsonl")
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(OtherSettings, match="policy"):
        run(path=tmp_path / "samples.jsonl")
    for text in ('{"prompt": "x"}\n', "my notes, one line without its end", '{"best_of_n": 9}\n'):
        (tmp_path / "other.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"other.jsonl: it is no file of samples"):
            run(path=tmp_path / "other.jsonl")
        assert (tmp_path / "other.jsonl").read_text() == text


# --- completions without a score -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_completions_without_a_score_are_counted_and_cannot_win(run, nothing):
    def few(completions, **columns):
        return [nothing if score > 5 else score for score in letters(completions)]

    plain = run(n=8)
    result = run(reward=few, n=8)
    missing = sum(reward > 5 for rewards in plain.rewards for reward in rewards)
    assert missing > 3 and result.unscored + 8 * len(result.dropped) >= missing
    for rewards, best in zip(result.rewards, result.best, strict=True):
        assert rewards[best] == max(reward for reward in rewards if reward is not None) <= 5


def test_a_prompt_without_any_score_is_dropped_and_named(run):
    def not_for_numbers(prompts, completions, **columns):
        scores = torch.tensor(letters(completions))
        return scores.masked_fill(torch.tensor([prompt == TEXTS[1] for prompt in prompts]), math.nan)

    result = run(reward=not_for_numbers)
    assert result.rows == [0, 2, 3, 4]
    assert [(entry.row, "none of its completions" in entry.reason) for entry in result.dropped] == [(1, True)]
    with pytest.raises(UserError, match="none of them has a winner .5 dropped: the reward gave none"):
        run(reward=lambda completions, **columns: [None] * len(completions))


def test_prompts_that_the_policy_cannot_read_are_dropped(run):
    result = run(prompts=["word " * 600, *TEXTS, ""])
    assert result.rows == [1, 2, 3, 4, 5]
    reasons = {entry.row: entry.reason for entry in result.dropped}
    assert "longer than the 512 tokens" in reasons[0] and reasons[6] == "the prompt has no tokens"


@pytest.fixture
def scorer(tiny_config, chat_tokenizer):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    tiny_config.num_labels = 1
    return RewardScorer(LlamaForSequenceClassification(tiny_config).eval(), chat_tokenizer)


def test_a_reward_model_gives_the_scores_that_it_gives_alone(run, scorer):
    result = run(reward=scorer, prompts=CHATS)
    for place, prompt in enumerate(CHATS):
        alone = [scorer([prompt], [completion])[0] for completion in result.completions[place]]
        assert result.rewards[place] == pytest.approx(alone, abs=1e-5)


def test_a_completion_that_the_reward_model_refuses_has_no_score(run, scorer, monkeypatch):
    refused = []

    class Short(RewardScorer):
        def score_ids(self, sequences, **options):
            if any(sequence[-2] % 3 == 0 for sequence in sequences):  # as if it were too long
                raise UserError("the sequence is too long")
            refused.append(len(sequences))
            return super().score_ids(sequences, **options)

    monkeypatch.setattr(scorer, "__class__", Short)
    result = run(reward=scorer)
    assert result.unscored and result.reward_problems[0] == "the sequence is too long"
    for place, of_prompt in enumerate(result.ids):
        for ids, text, reward in zip(of_prompt, result.texts[place], result.rewards[place], strict=True):
            assert isinstance(text, str) and (reward is None) == (_before_stop(scorer, place, text) % 3 == 0), ids


def _before_stop(scorer, place, text) -> int:
    ids = scorer.tokenizer(TEXTS[place])["input_ids"] + scorer.tokenizer(text)["input_ids"]
    return ids[-1]


# --- engines ---------------------------------------------------------------------------------------------------------


def test_an_engine_without_n_and_log_probabilities_is_enough(run):
    class Plain:
        def sync(self, policy):
            self.policy = policy

        def generate(self, prompt_ids, sampling):
            ids = torch.randint(5, 200, (len(prompt_ids), 3)).tolist()
            return Samples([row + [sampling.stop_ids[0]] for row in ids], None)

    result = run(engine=Plain())
    assert result.logprobs is None and result.winner_logprobs is None
    assert all(len(ids) == 4 for of_prompt in result.ids for ids in of_prompt)
    assert all(all(of_prompt) for of_prompt in result.stopped)


@pytest.mark.parametrize("n", [1, 20])
def test_one_completion_and_more_than_a_batch(run, n):
    result = run(n=n)
    assert [len(of_prompt) for of_prompt in result.completions] == [n] * 5


def test_a_policy_in_a_folder_is_loaded(tiny_llama, chat_tokenizer, tmp_path, run):
    tiny_llama.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    loaded = best_of_n(str(tmp_path), CHATS, letters, 4, dtype="float32", **OPTIONS)
    assert loaded.ids == run(prompts=CHATS).ids


# --- rows ------------------------------------------------------------------------------------------------------------


def made(texts, rewards, **changes) -> BestOfN:
    """A result of three samples a prompt."""
    n = len(texts[0])
    fields = {
        "n": n,
        "rows": list(range(len(texts))),
        "prompts": [f"question {number}" for number in range(len(texts))],
        "completions": texts,
        "texts": texts,
        "ids": [[[1]] * n] * len(texts),
        "logprobs": None,
        "rewards": rewards,
        "stopped": [[True] * n] * len(texts),
        "columns": [{}] * len(texts),
    }
    return BestOfN(**fields | changes)


def test_pairs_that_say_nothing_are_left_out_and_counted():
    texts = [["a", "b", "c"], ["a", "a ", "b"], ["a", "a", " a"], ["a", "b", "c"], ["a", "b", "c"], ["", "b", "c"]]
    rewards = [[1, 2, 3], [1, 2, None], [1, 1, 1], [2, 2, 2], [None, None, 5], [2, 1, 0]]
    pairs = made(texts, rewards).comparisons()
    (pair,) = pairs.rows
    assert (pair["chosen"], pair["rejected"], pair["row"]) == ("c", "a", 0)
    assert (pair["score_chosen"], pair["score_rejected"]) == (3, 1)
    # The second and third prompt, the fourth and fifth, and the last one.
    assert (pairs.same_text, pairs.same_reward, pairs.empty) == (2, 2, 1)


def test_empty_winners_are_no_demonstrations():
    rows = made([["a", ""], ["b", " "]], [[1, 2], [2, 1]]).demonstrations()
    assert rows == [{"prompt": "question 1", "completion": "b", "rating": 2, "row": 1}]


def test_the_first_samples_are_a_run_with_a_smaller_n():
    result = made([["a", "b", "c"], ["a", "b", "c"]], [[1, 2, 3], [None, None, 3]])
    first = result.of_first(2)
    assert first.winners == ["b"] and first.rows == [0] and [entry.row for entry in first.dropped] == [1]
    assert result.of_first(3).winners == ["c", "c"]
    with pytest.raises(UserError, match="from 1 to 3"):
        result.of_first(4)


@pytest.mark.parametrize("prompts", [TEXTS, CHATS])
def test_rows_load_as_demonstrations_and_comparisons_with_the_same_texts(run, prompts, tmp_path):
    result = run(prompts=prompts)
    write_rows(result.demonstrations(), tmp_path / "demonstrations.jsonl")
    rows, _ = load_demonstrations(str(tmp_path / "demonstrations.jsonl"))
    assert [row["completion"] for row in rows] == result.winners and [row["prompt"] for row in rows] == prompts

    write_rows(result.comparisons().rows, tmp_path / "comparisons.jsonl")
    pairs, _ = load_comparisons(str(tmp_path / "comparisons.jsonl"))
    assert len(pairs) == len(result.comparisons().rows) >= 4
    for pair, written in zip(pairs, result.comparisons().rows, strict=True):
        assert pair["completions"] == [written["chosen"], written["rejected"]]


def test_trl_trains_dpo_on_best_and_worst(run, tiny_llama, chat_tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    write_rows(run(prompts=CHATS).comparisons().rows, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        tiny_llama,
        args=DPOConfig(
            str(tmp_path / "dpo"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n": 0}, "n=0: give a whole number"),
        ({"n": "4"}, "n='4': give a whole number"),
        ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
        ({"temperature": None}, "temperature=None: give a number"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": None}, "top_p=None"),
        ({"top_k": 2.5}, "top_k=2.5: give a whole number"),
        ({"stop_strings": [""]}, "stop_strings: '' is not a text"),
        ({"reward_weights": 2.0}, "reward_weights=2.0: give a list"),
        ({"prompts": "Tell me"}, "prompts: one prompt is no list"),
        ({"prompts": CHATS[0]}, "prompts: one prompt is no list"),
        ({"prompts": {"prompt": TEXTS}}, "prompts: a dict is no list"),
        ({"prompts": pd.DataFrame({"prompt": TEXTS})}, "prompts: a DataFrame is no list"),
        ({"prompts": None}, "prompts: a NoneType is no list"),
        ({"prompts": []}, "prompts: the list is empty"),
        ({"prompts": ["x", 3]}, "prompts row 1: 3 is no text"),
        ({"reward": []}, "reward: the list is empty"),
        ({"reward": [letters], "reward_weights": [1, 2]}, "reward_weights has 2 entries for 1"),
        ({"reward": 3}, "reward: 3 is not a function"),
        ({"dtype": "float32"}, "dtype: it is used for a policy that is loaded"),
    ],
)
def test_a_mistake_is_one_line(run, changes, said):
    with pytest.raises(UserError, match=said):
        run(**changes)
