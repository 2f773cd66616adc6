# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[collect]==0.1.*"]
# ///
"""Rounds of RLHF in one folder: sample, judge, refresh the reward model, train the policy, compare the policies.

hf-rlhf rounds --prompts prompts.jsonl --model_name_or_path runs/sft --judge page --people anna tom --rounds 3

Finished stages are kept: the same command goes on where the run stopped, and a larger --rounds adds rounds.
With --judge file, the command ends with exit status 3 while it waits for a judged file.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir, refuse_used_folder
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe

# isort: split
import math
import tempfile
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import ModelArguments, TerminalArguments
from hf_rlhf_ext.cli.precision import quantization_config
from hf_rlhf_ext.cli.program import hide_values_of, how_to_run
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.stages import StageRunner, has_manifest
from hf_rlhf_ext.collect.sampling import PolicySpec, sample_tasks
from hf_rlhf_ext.collect.tasks import read_tasks, write_rows, write_tasks
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import content_digest
from hf_rlhf_ext.recipes.rounds_parts.data import (
    Row,
    count_labels,
    decided_pairs,
    judged_so_far,
    prompts_of_round,
    read_prompts,
    read_rows,
    repeated_prompts,
    split_prompts,
)
from hf_rlhf_ext.recipes.rounds_parts.evaluation import (
    PolicyEvaluator,
    as_on_page,
    gold_scores,
    is_better,
    mean_with_interval,
    paired_gain,
    pairs_by_policy,
    proxy_scores,
    same_text,
    win_rate,
)
from hf_rlhf_ext.recipes.rounds_parts.gold import CheckedGold
from hf_rlhf_ext.recipes.rounds_parts.judging import Judging, Outcomes, WaitingForFile, evaluation_task
from hf_rlhf_ext.recipes.rounds_parts.learners import Learners
from hf_rlhf_ext.recipes.rounds_parts.options import RoundsArguments
from hf_rlhf_ext.recipes.rounds_parts.report import print_table, write_results

ARGUMENTS = (RoundsArguments, TerminalArguments, ModelArguments)
SFT = "sft"
"""Name of the policy of round 0."""
WAITING_STATUS = 3
"""Exit status while the run waits for a judged file; a mistake has 2, as in every command."""


class Rounds:
    """The stages of a round. Each reads the files of the stages before it.

    Args:
        args: options of the rounds.
        model_args: the first policy, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
    """

    def __init__(self, args: RoundsArguments, model_args: ModelArguments, *, verbose: bool = False):
        self.args = args
        self.model_args = model_args
        self.folder = args.folder
        self.data = self.folder / "data"
        self.gold = args.load_gold()
        self.learners = Learners(args, model_args, verbose=verbose)
        self.judging = Judging(args, self.gold)

    # ---- Names and places ----

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def policy_name(self, number: int) -> str:
        """The name of the policy after round `number`; 0 is the SFT policy."""
        return SFT if number == 0 else f"round-{number}"

    def location(self, number: int) -> str:
        """Where the policy after round `number` is."""
        if number == 0:
            return self.model_args.model_name_or_path
        return str(self.round_folder(number) / "policy")

    def evaluation_file(self, number: int) -> Path:
        return self.data / "completions" / f"{self.policy_name(number)}.jsonl"

    def start_of(self, number: int) -> str:
        """The policy from which round `number` trains."""
        return self.location(number - 1 if self.args.start_from == "last" else 0)

    @cached_property
    def train_prompts(self) -> list[Row]:
        return read_rows(self.data / "prompts" / "train.jsonl")

    @cached_property
    def heldout_prompts(self) -> list[Row]:
        return read_rows(self.data / "heldout.jsonl")

    @cached_property
    def evaluator(self) -> PolicyEvaluator:
        options = self.learners.model_options(self.location(0))
        return PolicyEvaluator(
            self.location(0),
            revision=self.model_args.revision,
            base_options={
                "dtype": options.dtype,
                "quantization_config": quantization_config(options),
                "attn_implementation": options.attn_implementation,
            },
            temperature=self.args.temperature,
            max_new_tokens=self.args.max_completion_length,
            max_tokens=self.args.max_tokens_per_batch,
            seed=self.args.seed,
        )

    # ---- Before the first round ----

    @cached_property
    def split(self) -> tuple[list[Row], list[Row]]:
        """The prompts to train on and the held-out ones, as the options name them."""
        args = self.args
        rows = read_prompts(args.prompts, "prompts")
        heldout = None
        if args.heldout_prompts is not None:
            heldout = read_prompts(args.heldout_prompts, "heldout_prompts")
        return split_prompts(rows, heldout, args.eval_prompts, args.seed)

    def check(self) -> None:
        """Refuses what would fail later, before anything is written or loaded, and says what has no effect."""
        for line in self.args.unused():
            print(line)
        self.judging.check_packages()
        train, _ = self.split
        if isinstance(self.gold, CheckedGold):
            prompt = as_on_page(train[0]["prompt"])
            self.gold([prompt, prompt], ["Yes.", "This is a short answer."])
        self.learners.check_model()
        line = repeated_prompts(len(train), self.args.rounds, self.args.prompts_per_round)
        if line is not None:
            print(line)

    def prompts_digest(self) -> str:
        """A digest of the split prompts, by which a folder with other prompts is refused."""
        with tempfile.TemporaryDirectory() as folder:
            self._write_split(Path(folder))
            return content_digest(Path(folder), (".jsonl",))

    def write_prompts(self) -> None:
        """Writes the split prompts, unless they are there."""
        if not (self.data / "heldout.jsonl").is_file():
            self._write_split(self.data)

    def _write_split(self, folder: Path) -> None:
        train, heldout = self.split
        write_rows(train, folder / "prompts" / "train.jsonl")
        write_rows(heldout, folder / "heldout.jsonl")

    # ---- The stages of a round ----

    def sample(self, number: int) -> dict[str, Any]:
        """Samples completions of the last policy for the prompts of this round."""
        args = self.args
        revision = self.model_args.revision if number == 1 else None
        policy = PolicySpec(self.policy_name(number - 1), self.location(number - 1), revision)
        sampled = sample_tasks(
            prompts_of_round(self.train_prompts, number, args.prompts_per_round),
            [policy],
            k=args.completions,
            temperatures=(args.temperature,),
            max_new_tokens=args.max_completion_length,
            seed=args.seed + number,
            wanted=args.wanted,
            batch=f"round-{number}",
            **self.evaluator.base_options,
        )
        print(sampled.summary())
        write_tasks(self.round_folder(number) / "tasks.jsonl", sampled.tasks)
        return {"tasks": len(sampled.tasks), "dropped": len(sampled.dropped)}

    def judge(self, number: int) -> dict[str, Any]:
        """Gets the completions of this round judged."""
        folder = self.round_folder(number)
        tasks = read_tasks(folder / "tasks.jsonl")
        rows = self.judging.judge(tasks, f"round-{number}", folder)
        return {"by": self.judging.judged_by(rows), "prompts": len(rows), "labels": count_labels(rows)}

    def reward_model(self, number: int) -> dict[str, Any]:
        """Trains a reward model on the judgments of all rounds so far."""
        folder = self.round_folder(number)
        train, heldout = self.judgments_until(number)
        if not train:
            raise UserError(
                f"heldout_share: none of the {len(heldout)} judged prompts is left to train on: judge more prompts, or "
                "lower heldout_share."
            )
        comparisons = folder / "comparisons"
        write_rows(train, comparisons / "train.jsonl")
        (comparisons / "test.jsonl").unlink(missing_ok=True)
        if heldout:
            write_rows(heldout, comparisons / "test.jsonl")
        else:
            print(f"no accuracy of this reward model: heldout_share={self.args.heldout_share:g} held out no judgment")
        sizes = {"n_train": len(train), "n_heldout": len(heldout)}
        return self.learners.reward_model(comparisons, folder / "reward_model", **sizes)

    def policy(self, number: int) -> dict[str, Any]:
        """Trains the policy of this round."""
        folder = self.round_folder(number)
        start = self.start_of(number)
        seed = self.args.seed + 1000 * number  # other rollouts than in the rounds before
        if self.args.learner == "dpo":
            train, heldout = self.judgments_until(number)
            return self.learners.dpo(start, decided_pairs(train + heldout), folder / "policy", seed=seed)
        return self.learners.ppo(start, folder / "reward_model", self.data / "prompts", folder / "policy", seed=seed)

    def judgments_until(self, number: int) -> tuple[list[Row], list[Row]]:
        """Comparisons to train on and held-out ones, of the rounds 1 to `number`."""
        judged = [read_rows(self.round_folder(r) / "comparisons.jsonl") for r in range(1, number + 1)]
        return judged_so_far(
            judged,
            round_weight=self.args.round_weight,
            heldout_share=self.args.heldout_share,
            seed=self.args.seed,
        )

    def evaluate(self, number: int) -> dict[str, Any]:
        """Compares the policy of this round with every earlier one, on held-out prompts."""
        completions: dict[str, list[Row]] = {}
        for earlier in range(number + 1):
            name = self.policy_name(earlier)
            path = self.evaluation_file(earlier)  # of an earlier round: sampled once, then kept
            completions[name] = self.evaluator.completions(self.location(earlier), self.heldout_prompts, path)
        new = completions[self.policy_name(number)]
        measured: dict[str, Any] = {
            "kl": mean_with_interval([row["kl"] for row in new]),
            "length": mean_with_interval([row["n_tokens"] for row in new]),
        }
        if number == 1:
            measured["sft_length"] = mean_with_interval([row["n_tokens"] for row in completions[SFT]])
        if self.gold is not None:
            scores = {name: gold_scores(self.gold, rows) for name, rows in completions.items()}
            measured.update(compared("gold", scores))
        if self.args.learner == "ppo":
            scores = proxy_scores(self.round_folder(number) / "reward_model", completions)
            measured.update(compared("proxy", scores))
        measured.update(self.win_rates(number, completions))
        return measured

    def win_rates(self, number: int, completions: dict[str, list[Row]]) -> dict[str, Any]:
        """Win rates of the new policy against every earlier one, by judgments that nothing is trained on."""
        name = self.policy_name(number)
        new = completions[name]
        earlier = [policy for policy in completions if policy != name]
        n_pairs = self.args.pairs_to_judge(len(new), len(earlier))
        chosen = pairs_by_policy(len(new), earlier, n_pairs)
        batch = f"evaluation-{number}"
        tasks = {}
        for policy, prompts in chosen.items():
            for k in prompts:
                old = completions[policy][k]
                if same_text(new[k], old):
                    continue
                task = evaluation_task(
                    new[k], old, names=(name, policy), batch=batch, wanted=self.args.wanted, seed=self.args.seed
                )
                tasks.setdefault(task.fingerprint, task)  # two earlier policies may have said the same
        folder = self.round_folder(number)
        self.judging.judge(list(tasks.values()), batch, folder, suffix="_evaluation")

        # A pair that was judged in an earlier round is not judged again.
        rows = []
        for r in range(1, number + 1):
            rows += read_rows(self.round_folder(r) / "comparisons_evaluation.jsonl")
        outcomes = Outcomes(rows)
        rates = {}
        for policy, prompts in chosen.items():
            values = []
            for k in prompts:
                old = completions[policy][k]
                value = 0.5 if same_text(new[k], old) else outcomes.of(new[k], old)
                if value is not None:
                    values.append(value)
            if values:
                rates[policy] = win_rate(values)
        return {"win_rate": rates, "judged_pairs": len(tasks)}


def compared(reward: str, scores: dict[str, list[float]]) -> dict[str, Any]:
    """Mean reward of each policy, and the paired gain of the last one over every other one."""
    *earlier, new = scores
    means = {}
    for policy, values in scores.items():
        known = [value for value in values if not math.isnan(value)]
        if not known:
            raise UserError(f"{reward}: no held-out completion of {policy} got a number: correct the reward function.")
        means[policy] = mean_with_interval(known)
    gains = {}
    for policy in earlier:
        gains[policy] = paired_gain(scores[policy], scores[new])
        if gains[policy]["n"] == 0:
            raise UserError(f"{reward}: on no held-out prompt, both {policy} and {new} got a number: correct it.")
    return {reward: means, f"{reward}_gain": gains}


STAGES = ("sample", "judge", "reward_model", "policy", "evaluate")
"""Stages of a round: names of methods of `Rounds`, in their order."""


def stages_of(args: RoundsArguments) -> list[str]:
    """The stages of a round in their order. DPO has no reward model."""
    return [stage for stage in STAGES if args.learner == "ppo" or stage != "reward_model"]


def describe(args: RoundsArguments, stage: str, number: int) -> str:
    """What a stage does, in a few words."""
    rounds = "1 round" if number == 1 else f"{number} rounds"
    updates = "1 PPO update" if args.updates == 1 else f"{args.updates} PPO updates"
    last = "the SFT policy" if number == 1 else f"the policy of round {number - 1}"
    start = last if args.start_from == "last" else "the SFT policy"
    judges = {
        "page": "by people in a browser",
        "simulated": "by simulated annotators",
        "mixed": "by people and simulated annotators",
        "file": "in a file by hand",
    }
    training = f"{updates} of {args.rollout} completions, from {start}"
    if args.learner == "dpo":
        training = f"DPO on the judged pairs of {rounds}, from {start}; no reward model, so no accuracy of one"
    return {
        "sample": f"{args.completions} completions of {last} for each of {args.prompts_per_round} prompts",
        "judge": judges[args.judge],
        "reward_model": f"trained from the base on the judgments of {rounds}",
        "policy": training,
        "evaluate": f"{args.eval_prompts} held-out prompts, against every earlier policy",
    }[stage]


def run_rounds(
    args: RoundsArguments, model_args: ModelArguments, *, verbose: bool = False, kind: type[Rounds] = Rounds
) -> dict[str, Any] | None:
    """Runs the stages that are not finished, and writes the report.

    Args:
        args: options of the rounds.
        model_args: the first policy, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
        kind: the class of the stages.

    Returns:
        The content of `report.json`, or None if the run waits for a judged file.
    """
    folder = args.folder
    is_resumed = has_manifest(folder) and not args.overwrite
    if not (is_resumed or args.overwrite):
        refuse_used_folder(folder, "run of rounds")
    rounds = kind(args, model_args, verbose=verbose)
    rounds.check()
    with only_process(folder):
        prepare_output_dir(folder, resume=is_resumed, overwrite=args.overwrite)
        stages = open_stages(rounds)
        rounds.write_prompts()
        try:
            run_stages(rounds, stages)
        except WaitingForFile as waiting:
            print(waiting)
            return None
        stages.announce("report", "report.json, rounds.md, rounds.png and model cards")
        return write_results(rounds, stages, finished_rounds(stages))


def open_stages(rounds: Rounds) -> StageRunner:
    """The stages of all rounds in the folder of the run."""
    settings = rounds.args.settings() | {
        "model": rounds.model_args.model_name_or_path,
        "revision": rounds.model_args.revision,
        "dtype": rounds.model_args.dtype,
        "prompts": rounds.prompts_digest(),
    }
    names = []
    for number in range(1, rounds.args.rounds + 1):
        names += [stage_name(number, stage) for stage in stages_of(rounds.args)]
    return StageRunner(rounds.folder, settings, [*names, "report"])


def stage_name(number: int, stage: str) -> str:
    """The name of a stage of a round, in the terminal and in the manifest."""
    return f"round-{number}/{stage}"


def finished_rounds(stages: StageRunner) -> int:
    """Number of finished rounds in the folder, of which there may be more than were asked for now."""
    number = 0
    while stages.is_finished(stage_name(number + 1, STAGES[-1])):
        number += 1
    return number


def run_stages(rounds: Rounds, stages: StageRunner) -> None:
    """Runs the rounds that are not finished."""
    args = rounds.args
    for number in range(1, args.rounds + 1):
        measured: dict[str, Any] = {}
        for stage in stages_of(args):
            work = partial(getattr(rounds, stage), number)
            measured = stages.run(stage_name(number, stage), describe(args, stage, number), work)
        goes_on = finished_rounds(stages) > number  # an earlier run did
        if args.stop_when_not_better and number < args.rounds and not goes_on:
            if not beats_the_last(rounds, number, measured):
                return


def beats_the_last(rounds: Rounds, number: int, measured: dict[str, Any]) -> bool:
    """Whether the policy of a round wins against the last one, by its interval. Prints a line if it does not."""
    last = rounds.policy_name(number - 1)
    rate = measured["win_rate"].get(last)
    if rate is not None and is_better(rate):
        return True
    known = (
        "no pair was judged"
        if rate is None
        else "win rate {:.2f}, 95% interval {:.2f} to {:.2f}".format(rate["mean"], *rate["ci95"])
    )
    print(f"stopped after round {number}: its policy is not better than {last} ({known})")
    return False


def next_steps(args: RoundsArguments, finished: int) -> str:
    """What to look at, and how to go on after round `finished`."""
    folder = args.output_dir
    return (
        f"Report: {folder}/rounds.md · {folder}/report.json · {folder}/rounds.png · a card in each round-N/policy\n"
        f"Next: the same command with --rounds {finished + 1}, or "
        f"{how_to_run('push')} {folder}/round-{finished}/policy"
    )


def main() -> None:
    hide_values_of("people", "host", "url")
    args, terminal, model_args = parse_recipe(ARGUMENTS, description=__doc__, main_options=main_options.ROUNDS)
    with library_output(verbose=terminal.verbose):
        report = run_rounds(args, model_args, verbose=terminal.verbose)
    if report is None:
        raise SystemExit(WAITING_STATUS)
    print_table(report)
    print(next_steps(args, len(report["rounds"])))


if __name__ == "__main__":
    run_recipe(main)
