"""The functions in TRL's GRPO and RLOO trainers as they are, and their columns in ours."""

import re

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from hf_rlhf_ext.reward_functions import code, exact_match, judge, math, multiple_choice, number, regex
from tests.reward_functions.chat_server import Answer, chat_server

ROWS = [
    {"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "answer": str(n + 1), "tests": ["assert True"]}
    for n in range(4)
]


@pytest.mark.slow
@pytest.mark.parametrize("config, trainer_class", [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)])
def test_trl_trains_on_them(config, trainer_class, tiny_llama, chat_tokenizer, tmp_path):
    lengths = []
    tiny_llama.save_pretrained(tmp_path / "policy")
    chat_tokenizer.save_pretrained(tmp_path / "policy")

    def by_length(text, number):
        lengths.append(len(re.search(r"Answer:\n=+\n(.*)\n=+\n", text, re.DOTALL)[1]))
        return Answer(f"Score: {1 + lengths[-1] % 10}")

    with chat_server(by_length) as server:
        opinion = judge("m", server.base_url)
        functions = [opinion, exact_match(), number(), multiple_choice(choices="1234"), regex("a"), code(), math()]
        args = config(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, per_device_train_batch_size=4,
            num_generations=4, max_completion_length=6, disable_tqdm=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = trainer_class(
            str(tmp_path / "policy"),
            functions,
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=chat_tokenizer,
        )
        trainer.train()
    (logged,) = [row for row in trainer.state.log_history if "rewards/judge/mean" in row]
    assert {f"rewards/{function.__name__}/mean" for function in functions} <= logged.keys()
    # Random tokens are no answers; the judge's scores follow the lengths of what it got.
    assert logged["rewards/exact_match/mean"] == logged["rewards/math/mean"] == 0
    assert opinion.coverage.share == 1 and opinion.coverage.scored == 4
    if len(lengths) == 4:  # no two completions are equal
        assert logged["rewards/judge/mean"] == pytest.approx(sum(n % 10 for n in lengths) / 4 / 9, abs=1e-5)


def test_columns_are_checked_before_training():
    columns = list(ROWS[0])
    RewardFunctions([exact_match(), number("answer"), code()]).check_call(columns, where="train_dataset")
    with pytest.raises(UserError, match="'exact_match' needs 'answers'.*did you mean 'answer'"):
        RewardFunctions(exact_match("answers")).check_call(columns, where="train_dataset")


def test_scores_of_several_functions():
    rewards = RewardFunctions([exact_match(), number(tolerance=1)], [1.0, 0.5])
    answers = [[{"role": "assistant", "content": text}] for text in ("1", "2", "3")]
    scores = rewards.score([row["prompt"] for row in ROWS[:3]], answers, answer=["1", "3", "5"])
    assert rewards.names == ["exact_match", "number"]
    assert scores.per_func.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert scores.sequence.tolist() == [1.5, 0.5, 0.0]
