"""What a stage of `hf-rlhf compare` trains: options, folders, clocks and checkpoints, and SFT, reward model and PPO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
from hf_rlhf_ext.cli.stage_options import model_options, trainer_options, warmup_steps
from hf_rlhf_ext.cli.stage_progress import StageProgress
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.recipes.compare_parts.options import CompareArguments
from hf_rlhf_ext.recipes.compare_parts.records import Clock, Snapshot
from hf_rlhf_ext.recipes.compare_parts.snapshots import (
    NEVER,
    TrainingTimer,
    complete_snapshots,
    remove_checkpoints,
)
from hf_rlhf_ext.recipes.compare_parts.systems import SystemSpec, amount, training_options
from hf_rlhf_ext.recipes.pipeline_parts.amounts import (
    LEARNING_RATES,
    MAX_LENGTH,
    ROLLOUT,
    batch_of,
    epochs_of,
    updates_of,
)
from hf_rlhf_ext.recipes.ppo import RewardArguments, train_ppo
from hf_rlhf_ext.recipes.reward import train_reward
from hf_rlhf_ext.recipes.rounds_parts.data import Row
from hf_rlhf_ext.recipes.sft import train_sft

POLICY = "policy"
"""Folder of the adapter in the folder of a system."""
SNAPSHOTS = "snapshots"
PASSES, MINI_BATCHES = 2, 2
"""Of PPO, GRPO and RLOO: passes over a rollout, and optimizer steps of a pass."""
GENERATIONS = 4
"""Completions of a prompt in a rollout of GRPO and RLOO."""
KL_COEF = 0.05
NORMALIZATION_ROWS = 128
"""Comparisons on whose completions the rewards are normalized: more cost time and change little."""
TOLD = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size")
"""Options of all trainers that the report names."""
TOLD_OF_PPO = ("kl_coef", "kl_target", "critic", "num_generations", "num_ppo_epochs", "clip_range")


@dataclass(frozen=True)
class Trained:
    """What a training leaves for the record of its system.

    Attributes:
        own: time of training, without evaluations and saving.
        snapshots: policies that were saved during training.
        completions: number of completions that were sampled.
        settings: options that matter to a reader.
        measured: what the trainer measured.
    """

    own: Clock
    snapshots: tuple[Snapshot, ...] = ()
    completions: int = 0
    settings: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """Where a system is trained.

    Attributes:
        seed_folder: folder of the seed.
        folder: folder of the system.
        seed: the seed.
    """

    seed_folder: Path
    folder: Path
    seed: int

    @property
    def policy(self) -> Path:
        return self.folder / POLICY

    @property
    def location(self) -> str:
        """The folder of the system relative to that of the seed."""
        return self.folder.relative_to(self.seed_folder).as_posix()


class Learners:
    """Trains with the options of a run. A training that was stopped goes on from its last complete checkpoint.

    Args:
        args: options of the comparison.
        model_args: the base, its precision, and the size of new adapters.
        size: "small" or "large": by how many hidden units the base has.
        progress: the bar of the whole run.
        verbose: whether to show all output of the trainers.
    """

    def __init__(
        self,
        args: CompareArguments,
        model_args: ModelArguments,
        *,
        size: str = "small",
        progress: StageProgress | None = None,
        verbose: bool = False,
    ):
        self.args = args
        self.model_args = model_args
        self.size = size
        self.progress = progress
        self.verbose = verbose

    # ---- Options ----

    def common(self, output_dir: Path, seed: int) -> dict[str, Any]:
        """Options that all trainers share. Checkpoints are saved by time, see `TrainingTimer`."""
        return trainer_options(self.model_args) | {
            "output_dir": str(output_dir),
            "seed": seed,
            "trust_remote_code": self.args.trust_remote_code,
            "save_strategy": "steps",
            "save_steps": NEVER,
            "save_total_limit": 1,
            "disable_tqdm": True,  # there is one bar over all stages
            "resume_from_checkpoint": last_complete_checkpoint(output_dir),
        }

    def options(self, spec: SystemSpec, output_dir: Path, seed: int, **defaults: Any) -> Any:
        """The config of a system's trainer: the user's options, and else `defaults`."""
        options = self.common(output_dir, seed) | defaults
        return training_options(f"systems: {spec.name}", spec.section, spec.training, **options)

    def rate(self, section: str) -> float:
        """The learning rate of adapters, unless the user gives one."""
        rates = LEARNING_RATES[self.size]
        return rates.get(section, rates["ppo"])

    def sft_options(self, spec: SystemSpec, output_dir: Path, seed: int, n_rows: int) -> Any:
        """The options of SFT on so many rows."""
        where = f"systems: {spec.name}"
        batch = amount(where, spec.training, "per_device_train_batch_size", batch_of(n_rows))
        epochs = amount(where, spec.training, "num_train_epochs", epochs_of(n_rows))
        return self.options(
            spec,
            output_dir,
            seed,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            learning_rate=self.rate("sft"),
            warmup_steps=warmup_steps(n_rows, epochs, batch),
            max_length=MAX_LENGTH,
            logging_steps=10,
        )

    def reward_options(self, output_dir: Path, seed: int, n_rows: int) -> Any:
        """The options of the reward model on comparisons of so many prompts."""
        given = self.args.section("reward")
        batch = amount("reward", given, "per_device_train_batch_size", batch_of(n_rows))
        epochs = amount("reward", given, "num_train_epochs", 1)
        return training_options(
            "reward",
            "reward",
            given,
            **self.common(output_dir, seed),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=8,
            learning_rate=self.rate("reward"),
            warmup_steps=warmup_steps(n_rows, epochs, batch),
            max_tokens_per_batch=self.args.max_tokens_per_batch,
            max_length=MAX_LENGTH,
            logging_steps=10,
            normalization_max_rows=NORMALIZATION_ROWS,
            overflow="drop",
            unrenderable="drop",
        )

    def ppo_options(self, spec: SystemSpec, output_dir: Path, seed: int, n_prompts: int) -> Any:
        """The options of PPO on so many prompts."""
        given = spec.training
        number = partial(amount, f"systems: {spec.name}", given)
        mini_batches = number("num_mini_batches", MINI_BATCHES)
        batch = number("per_device_train_batch_size", max(ROLLOUT // mini_batches, 1))
        steps_per_update = number("num_ppo_epochs", PASSES) * mini_batches
        rollout = batch * mini_batches * number("gradient_accumulation_steps", 1)
        defaults: dict[str, Any] = {
            "per_device_train_batch_size": batch,
            "num_mini_batches": mini_batches,
            "num_ppo_epochs": PASSES,
            "learning_rate": self.rate("ppo"),
            "critic": "head",  # needs one forward pass less than an adapter
            "max_tokens_per_batch": self.args.max_tokens_per_batch,
            "temperature": self.args.temperature,
            "max_completion_length": self.args.max_completion_length,
            "kl_coef": KL_COEF,
            "logging_steps": steps_per_update,
            "unrenderable": "drop",
        }
        if given.get("critic", "head") == "head":
            defaults["value_learning_rate"] = 1e-3  # the head has one layer and starts from zero
        if "num_train_epochs" not in given:  # max_steps would come first
            per_prompt = number("num_generations", 1)
            defaults["max_steps"] = updates_of(n_prompts, max(rollout // per_prompt, 1)) * steps_per_update
        return self.options(spec, output_dir, seed, **defaults)

    def base(self) -> ModelArguments:
        """The options of the base model."""
        return model_options(self.model_args, self.model_args.model_name_or_path, self.model_args.revision)

    def timer(self, place: Place, spec: SystemSpec | None = None, every: int = 1) -> TrainingTimer:
        """The clock of a training. Only systems have snapshots."""
        return TrainingTimer(
            clock=self.args.clock,
            save_seconds=self.args.save_seconds,
            snapshot_seconds=None if spec is None else spec.snapshot_seconds(self.args),
            folder=place.folder / SNAPSHOTS,
            location=f"{place.location}/{SNAPSHOTS}",
            max_seconds=None if spec is None else spec.options.max_seconds,
            every=every,
            progress=self.progress,
        )

    # ---- Training ----

    def sft(self, spec: SystemSpec, rows: Sequence[Row], place: Place) -> Trained:
        """Trains a new adapter of the base on demonstrations."""
        source = place.folder / "demonstrations.jsonl"
        write_rows(rows, source)
        set_seed(place.seed)  # a new adapter is initialized before the trainer sets the seed
        args = self.sft_options(spec, place.policy, place.seed, len(rows))
        timer = self.timer(place, spec)
        data = DataArguments(dataset_name=str(source), overwrite=args.resume_from_checkpoint is None)
        train_sft(data, self.base(), args, callbacks=[timer], verbose=self.verbose, says_rows=False)
        return finished(timer, place, args, {"demonstrations": len(rows)})

    def reward_model(self, comparisons: Path, place: Place, n_rows: int, *, has_test: bool) -> tuple[Trained, dict]:
        """Trains a reward model from the base on `train.jsonl`, and measures it on `test.jsonl`."""
        set_seed(place.seed)  # the head is initialized when the model is loaded
        args = self.reward_options(place.folder, place.seed, n_rows)
        timer = self.timer(place)
        data = DataArguments(
            dataset_name=str(comparisons),
            dataset_test_split="test" if has_test else None,
            overwrite=args.resume_from_checkpoint is None,
        )
        report = train_reward(data, self.base(), args, callbacks=[timer], verbose=self.verbose, says_rows=False)
        remove_checkpoints(place.folder)
        return Trained(timer.own, settings=told(args)), report["reward_model"]

    def ppo(self, spec: SystemSpec, start: str, reward: Mapping[str, list[str]], place: Place, **files: Any) -> Trained:
        """Trains a policy further by PPO; the reference of its KL penalty is its start.

        Args:
            spec: the system.
            start: folder of the policy.
            reward: `reward_model` or `reward_funcs`, as `RewardArguments` has them.
            place: where it is trained.
            files: `prompts`, the folder with the prompts to train on, `n_prompts`, and `texts` for PPO-ptx.
        """
        set_seed(place.seed)
        args = self.ppo_options(spec, place.policy, place.seed, files["n_prompts"])
        timer = self.timer(place, spec, every=args.steps_per_rollout)
        rewards = RewardArguments(**reward, ptx_dataset=files["texts"] if args.ptx_coef > 0 else None)
        data = DataArguments(dataset_name=files["prompts"], overwrite=args.resume_from_checkpoint is None)
        result = train_ppo(
            data,
            rewards,
            model_options(self.model_args, start),
            args,
            callbacks=[timer],
            verbose=self.verbose,
            says_rows=False,
        )
        measured = result.report["ppo"]
        more = {name: getattr(args, name) for name in TOLD_OF_PPO}
        more |= {"rollout": args.rollout_size, "temperature": args.temperature}
        if args.ptx_coef > 0:
            more["ptx_coef"] = args.ptx_coef
        completions = measured["updates"] * args.rollout_size
        return finished(timer, place, args, more, completions=completions, measured=measured)


def finished(
    timer: TrainingTimer,
    place: Place,
    args: Any,
    more: Mapping[str, Any],
    *,
    completions: int = 0,
    measured: Mapping[str, Any] | None = None,
) -> Trained:
    """Tidies up after a training, and says what came of it."""
    complete_snapshots(timer.snapshots, place.seed_folder, place.policy)
    remove_checkpoints(place.policy)
    settings = told(args) | {name: value for name, value in more.items() if value is not None}
    if timer.ended_early:
        settings["max_seconds"] = timer.max_seconds
    return Trained(timer.own, tuple(timer.snapshots), completions, settings, measured)


def told(args: Any) -> dict[str, Any]:
    """The options of a trainer that the report names. `max_steps` comes before `num_train_epochs`, if it is set."""
    settings = {name: getattr(args, name) for name in TOLD}
    settings.pop("num_train_epochs" if args.max_steps > 0 else "max_steps")
    return settings
