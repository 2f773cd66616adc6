"""What a round trains: the reward model on all judgments so far, and the policy by PPO or DPO."""

import gc
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, set_seed
from trl import DPOConfig, DPOTrainer

from hf_rlhf_ext import BradleyTerryConfig, PPOConfig, load_policy
from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli.finish import finish_run
from hf_rlhf_ext.cli.first_checks import check_policy_folder
from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
from hf_rlhf_ext.cli.output import prepare_output_dir
from hf_rlhf_ext.cli.progress import show_progress
from hf_rlhf_ext.cli.stage_options import model_options, trainer_options, warmup_steps
from hf_rlhf_ext.data.prompt_form import PromptForm, form_of_model
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.reports.trainer_report import section_steps, trainer_card_options
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.loading import base_and_revision, found_or_refused
from hf_rlhf_ext.modeling.locations import resolve_location
from hf_rlhf_ext.recipes.ppo import RewardArguments, train_ppo
from hf_rlhf_ext.recipes.reward import train_reward
from hf_rlhf_ext.recipes.rounds_parts.options import RoundsArguments

STEPS_PER_UPDATE = 4
"""Optimizer steps of one PPO update: two passes over the rollout in two mini-batches, as in the quickstart."""
NORMALIZATION_ROWS = 128
"""Number of judged prompts on whose completions the rewards are normalized: more cost time and change little."""


class Learners:
    """Trains with the options of a run.

    Args:
        args: options of the rounds.
        model_args: the model of round 0, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
    """

    def __init__(self, args: RoundsArguments, model_args: ModelArguments, *, verbose: bool = False):
        self.args = args
        self.model_args = model_args
        self.verbose = verbose

    def common(self, output_dir: Path) -> dict[str, Any]:
        """Options that all trainers share."""
        return trainer_options(self.model_args) | {"output_dir": str(output_dir), "seed": self.args.seed}

    def model_options(self, name: str, revision: str | None = None) -> ModelArguments:
        """The options of the model for another name: same precision, same size of a new adapter."""
        return model_options(self.model_args, name, revision)

    def check_model(self) -> None:
        """Reads the configuration of the first policy's base, which shows whether there is such a model.

        Raises:
            UserError: there is not, or DPO should train all of its weights.
        """
        if self.args.learner == "dpo" and not self.model_args.use_peft:
            raise UserError("use_peft: --learner dpo trains an adapter: leave it out, or pass --learner ppo.")
        check_policy_folder(self.model_args.model_name_or_path)
        name, revision = self.base()
        path, location = resolve_location(name, revision)
        with found_or_refused("model_name_or_path", name):
            AutoConfig.from_pretrained(path, **location)

    def base(self) -> tuple[str, str | None]:
        """Name and revision of the base model, on which reward models are trained."""
        name = self.model_args.model_name_or_path
        base, revision = base_and_revision(name, self.model_args.revision)
        if base is None:  # not an adapter
            return name, self.model_args.revision
        return base, revision

    def reward_model(self, comparisons: Path, output_dir: Path, *, n_train: int, n_heldout: int) -> dict[str, Any]:
        """Trains a reward model from the base on `train.jsonl` of a folder, and evaluates it on `test.jsonl`.

        It starts from the base in every round, not from the reward model of the last round: so it depends only on the
        judgments, and older judgments do not count more because they were trained on more often.
        """
        set_seed(self.args.seed)  # the head is initialized when the model is loaded
        args = BradleyTerryConfig(
            **self.common(output_dir),
            num_train_epochs=self.args.reward_epochs,
            learning_rate=self.args.reward_learning_rate,
            warmup_steps=self._warmup_steps(n_train, self.args.reward_epochs),
            per_device_train_batch_size=self.args.reward_batch,
            per_device_eval_batch_size=8,
            max_tokens_per_batch=self.args.max_tokens_per_batch,
            max_length=None,
            logging_steps=10,
            save_strategy="no",
            normalization_max_rows=NORMALIZATION_ROWS,
            unrenderable="drop",
            resume_from_checkpoint=last_complete_checkpoint(output_dir),  # of a run that was stopped in this stage
        )
        data = DataArguments(
            dataset_name=str(comparisons),
            dataset_test_split="test" if n_heldout else None,
            overwrite=args.resume_from_checkpoint is None,
        )
        report = train_reward(data, self.model_options(*self.base()), args, verbose=self.verbose)
        return report["reward_model"]

    def ppo(self, start: str, reward_model: Path, prompts: Path, output_dir: Path, *, seed: int) -> dict[str, Any]:
        """Trains the policy `start` further. A stopped run goes on from its last checkpoint."""
        set_seed(seed)  # a new adapter on a base model is initialized before the trainer sets the seed
        args = PPOConfig(
            **self.common(output_dir) | {"seed": seed},
            max_steps=self.args.updates * STEPS_PER_UPDATE,
            learning_rate=self.args.learning_rate,
            value_learning_rate=self.args.value_learning_rate,
            critic="head",  # needs one forward pass less than an adapter
            per_device_train_batch_size=self.args.rollout // 2,
            num_mini_batches=2,
            num_ppo_epochs=2,
            max_tokens_per_batch=self.args.max_tokens_per_batch,
            max_completion_length=self.args.max_completion_length,
            temperature=self.args.temperature,
            kl_coef=self.args.kl_coef,
            logging_steps=1,
            eval_strategy="no",
            save_steps=4 * STEPS_PER_UPDATE,
            save_total_limit=1,
            resume_from_checkpoint=last_complete_checkpoint(output_dir),
            unrenderable="drop",
        )
        data = DataArguments(dataset_name=str(prompts), overwrite=args.resume_from_checkpoint is None)
        rewards = RewardArguments(reward_model=[str(reward_model)])
        result = train_ppo(data, rewards, self._start_options(start), args, verbose=self.verbose)
        return result.report["ppo"]

    def dpo(self, start: str, pairs: list[dict[str, Any]], output_dir: Path, *, seed: int) -> dict[str, Any]:
        """Trains the policy `start` on pairs with TRL's DPOTrainer; the reference is `start` itself."""
        if not pairs:
            raise UserError("learner: every judgment so far is a tie, and DPO needs decided pairs: judge more prompts.")
        prepare_output_dir(output_dir, resume=False, overwrite=True)
        set_seed(seed)  # as for PPO
        model_args = self._start_options(start)
        args = DPOConfig(
            **self.common(output_dir) | {"seed": seed},
            num_train_epochs=self.args.dpo_epochs,
            learning_rate=self.args.learning_rate,
            warmup_steps=self._warmup_steps(len(pairs), self.args.dpo_epochs),
            beta=self.args.kl_coef,
            per_device_train_batch_size=self.args.reward_batch,
            max_length=None,
            logging_steps=10,
            save_strategy="no",
        )
        model, tokenizer = load_policy(
            start, revision=model_args.revision, is_trainable=True, **model_args.base_options(args)
        )
        # An adapter is trained further, and TRL keeps a copy of it as the reference. A base model gets a new adapter.
        peft_config = None if isinstance(model, PeftModel) else model_args.peft_config("CAUSAL_LM")
        prompt_form = PromptForm.of(pairs[0]["prompt"], tokenizer).after(form_of_model(model))
        trainer = DPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.prompt_form = prompt_form  # for the card: TRL's trainer does not keep it
        show_progress(trainer, verbose=self.verbose)
        result = trainer.train()
        save_adapter(trainer.model, "default", output_dir)  # without the copy
        tokenizer.save_pretrained(output_dir)
        prompt_form.save(output_dir)
        measured = {
            "pairs": len(pairs),
            "loss": result.metrics["train_loss"],
            "beta": args.beta,
            **section_steps(trainer),
        }
        card = trainer_card_options(trainer) | {
            "lineage": {"start": lineage_of(start, model_args.revision)},
            "data": [{"role": "comparisons", "rows": len(pairs)}],
        }
        seconds = result.metrics["train_runtime"]
        finish_run(args, "dpo", {"dpo": measured}, (model_args, args), seconds=seconds, card=card)
        del trainer
        gc.collect()  # a trainer is in a reference cycle: without it, its model stays in memory
        return measured

    def _warmup_steps(self, n_rows: int, n_epochs: int) -> int:
        return warmup_steps(n_rows, n_epochs, self.args.reward_batch)

    def _start_options(self, start: str) -> ModelArguments:
        """The options of the model that a round starts from; the revision is that of the first policy only."""
        revision = self.model_args.revision if start == self.model_args.model_name_or_path else None
        return self.model_options(start, revision)
