"""The stages of `hf-rlhf compare`: the data of a seed, its reward model, its systems and their evaluation."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_rlhf_ext.cli.first_checks import check_policy_folder, check_ppo, check_reward_folder, check_training
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.idle_options import idle_options
from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.precision import quantization_config
from hf_rlhf_ext.cli.stage_progress import StageProgress
from hf_rlhf_ext.cli.stages import MANIFEST, StageRunner
from hf_rlhf_ext.collect.sampling import free_memory
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import content_digest
from hf_rlhf_ext.modeling.loading import base_and_revision, found_or_refused, load_tokenizer
from hf_rlhf_ext.modeling.locations import resolve_location
from hf_rlhf_ext.recipes.compare_parts.data import CompareData, read_data, rows_of_seed, within_budget
from hf_rlhf_ext.recipes.compare_parts.evaluation import EvaluationSetup, evaluate
from hf_rlhf_ext.recipes.compare_parts.judging import make_judges
from hf_rlhf_ext.recipes.compare_parts.learners import Learners, Place
from hf_rlhf_ext.recipes.compare_parts.making import SystemMaker
from hf_rlhf_ext.recipes.compare_parts.options import CompareArguments
from hf_rlhf_ext.recipes.compare_parts.records import Clock, SystemRecord
from hf_rlhf_ext.recipes.compare_parts.systems import REWARD_MODEL, SFT, SystemSpec
from hf_rlhf_ext.recipes.compare_parts.trl_learners import TRLLearners
from hf_rlhf_ext.recipes.pipeline_parts.amounts import SMALL
from hf_rlhf_ext.recipes.rounds_parts.data import Row, count_labels, decided_pairs
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.study.alignment_tax import Item, default_items, load_items
from hf_rlhf_ext.study.independence import Statement, TrainingReward, check_independence
from hf_rlhf_ext.study.judges import Judge
from hf_rlhf_ext.training.optimizers import require_optimizer

DATA = "data"
EVALUATE = "evaluate"
REPORT = "report"
WEIGHTS = {
    DATA: 0.02,
    "base": 0.01,
    "best_of_n": 0.01,
    "sft": 0.5,
    REWARD_MODEL: 0.5,
    "rejection_sampling": 1.0,
    "dpo": 1.0,
    "grpo": 2.0,
    "rloo": 2.0,
    "ppo": 2.0,
    EVALUATE: 3.0,
    REPORT: 0.02,
}
"""How long stages take, compared with each other, before any of them was measured."""


class CompareRun:
    """A comparison in a folder.

    Args:
        args: options of the comparison.
        model_args: the base, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.
    """

    def __init__(self, args: CompareArguments, model_args: ModelArguments, *, verbose: bool = False):
        self.args = args
        self.model_args = model_args
        self.folder = args.folder
        self.specs = args.specs
        self.progress = StageProgress(self.stage_names(), weights=self._weights(), seconds=self._earlier_seconds())
        self.learners = Learners(args, model_args, progress=self.progress, verbose=verbose)
        self.trl = TRLLearners(self.learners)
        self.stages: StageRunner | None = None

    # ---- Names and places ----

    def seed_folder(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def system_folder(self, seed: int, name: str) -> Path:
        return self.seed_folder(seed) / "systems" / name

    def location(self, seed: int, name: str) -> str:
        """A location of a record as a path; the name of the base model as it is."""
        folder = self.seed_folder(seed) / name
        return str(folder) if folder.is_dir() else name

    def stage_names(self) -> list[str]:
        """All stages in their order."""
        names = []
        for seed in self.args.seeds:
            stages = [DATA, *self.specs]
            if self.args.trains_reward_model:
                stages.insert(stages.index(SFT) + 1, REWARD_MODEL)
            names += [stage(seed, name) for name in (*stages, EVALUATE)]
        return [*names, REPORT]

    def _weights(self) -> dict[str, float]:
        return WEIGHTS | {name: WEIGHTS[spec.kind] for name, spec in self.specs.items()}

    def _earlier_seconds(self) -> dict[str, float]:
        """Seconds of the stages that earlier calls finished, for the time left."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: entry["seconds"] for name, entry in manifest.get("stages", {}).items()}

    # ---- Before the first stage ----

    def check(self) -> None:
        """Refuses what would fail later, before anything is written or a model is loaded, and says what is not used."""
        for line in self.args.unused():
            print(line)
        if not self.model_args.use_peft:
            raise UserError("use_peft: the systems are adapters of one base: leave it out.")
        self._check_model()
        self._check_reward()
        self._check_training()
        _ = self.items, self.judges
        print("\n".join(self.data.lines))
        for statement in self.independence:
            print(statement.text)

    def _check_model(self) -> None:
        name, revision = self.model_args.model_name_or_path, self.model_args.revision
        if base_and_revision(name, revision)[0] is not None:
            raise UserError(f"model_name_or_path: {name} is an adapter: name its base, from which sft is trained.")
        check_policy_folder(name)
        path, location = resolve_location(name, revision)
        with found_or_refused("model_name_or_path", name):
            config = AutoConfig.from_pretrained(path, trust_remote_code=self.args.trust_remote_code, **location)
        is_small = getattr(config.get_text_config(), "hidden_size", SMALL) < SMALL
        self.learners.size = "small" if is_small else "large"

    def _check_reward(self) -> None:
        if self.args.reward_model is not None:
            check_reward_folder(self.args.reward_model)
        if self.args.reward_funcs is not None:
            reward_function(self.args.reward_funcs, "reward_funcs")

    def _check_training(self) -> None:
        """Reads the options of every trainer, whose names and values are checked by this."""
        n_rows = 64  # the real numbers only change the amounts
        for spec in self.specs.values():
            if spec.section is None:
                continue
            place = Place(self.seed_folder(0), self.system_folder(0, spec.name), 0)
            if spec.section == "sft":
                config = self.learners.sft_options(spec, place.policy, 0, n_rows)
            elif spec.kind == "dpo":
                config = self.trl.dpo_options(spec, place, n_rows)
            elif spec.kind == "ppo":
                config = self.learners.ppo_options(spec, place.policy, 0, n_rows)
                texts = self.args.plain_text if config.ptx_coef > 0 else None
                check_ppo(config, value_model=None, ptx_dataset=texts, patience=None)
            else:
                config = self.trl.online_options(spec, place, n_rows)
            check_training(config)
            require_optimizer(config, warn=False)
            for line in idle_options(config):
                print(f"systems: {spec.name}: {line}")
        if self.args.trains_reward_model:
            check_training(self.learners.reward_options(self.folder / REWARD_MODEL, 0, n_rows))

    @cached_property
    def data(self) -> CompareData:
        """The user's files, read and split."""
        return read_data(self.args, lambda: self.tokenizer.chat_template is not None)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(
            self.model_args.model_name_or_path,
            revision=self.model_args.revision,
            trust_remote_code=self.args.trust_remote_code,
        )

    @cached_property
    def items(self) -> list[Item]:
        """The items of the exact-match task."""
        return load_items(self.args.exact_match) if self.args.exact_match is not None else default_items()

    @cached_property
    def judges(self) -> list[Judge]:
        """The judges that the options name."""
        return make_judges(self.args.judges, self.folder / "people", trust_remote_code=self.args.trust_remote_code)

    @cached_property
    def independence(self) -> list[Statement]:
        """What was checked of judges and training reward.

        Raises:
            UserError: they share something.
        """
        functions = ()
        if self.args.reward_funcs is not None:
            functions = (reward_function(self.args.reward_funcs, "reward_funcs"),)
        trained_on_pairs = [spec for spec in self.specs.values() if spec.needs_comparisons(self.args)]
        uses_pairs = self.args.trains_reward_model or bool(trained_on_pairs)
        several = self.args.labels is not None and len(self.args.seeds) > 1  # each seed cuts other rows
        training = TrainingReward(
            name="training reward of all seeds" if several else "training reward",
            functions=functions,
            reward_model=self.args.reward_model,
            trained_on=self._trained_on() if uses_pairs else None,
            files=[self.args.comparisons] if uses_pairs else (),
        )
        return check_independence(self.judges, training)

    def _trained_on(self) -> list[Row]:
        """The comparisons that some seed trains on, within the budget of labels."""
        if self.args.labels is None:
            return self.data.comparisons
        return [row for seed in self.args.seeds for row in within_budget(self.data.comparisons, self.args.labels, seed)]

    # ---- The folder ----

    def settings(self) -> dict[str, Any]:
        """What every stage depends on."""
        defaults = vars(ModelArguments())
        changed = {name: value for name, value in vars(self.model_args).items() if value != defaults[name]}
        changed["model"] = lineage_of(changed.pop("model_name_or_path", self.model_args.model_name_or_path))
        return json.loads(json.dumps(changed, default=str))

    def open_stages(self) -> StageRunner:
        self.stages = StageRunner(self.folder, self.settings(), self.stage_names(), progress=self.progress)
        return self.stages

    # ---- The stages of a seed ----

    def run_seed(self, seed: int) -> dict[str, Any] | None:
        """Runs the stages of a seed that are not finished. Returns its results; None if nothing can be compared."""
        self.stages.run_if_changed(
            stage(seed, DATA),
            "reads the files, and holds prompts out",
            partial(self.make_data, seed),
            settings={"rows": self.data_digest()},
            reset=partial(remove, self.seed_folder(seed) / DATA),
        )
        for name, spec in self.specs.items():
            self._run_system(seed, spec)
            if name == SFT and self.args.trains_reward_model:
                self._run_reward_model(seed)
        if not self.stages.is_finished(stage(seed, SFT)):
            return None
        return self._run_evaluation(seed)

    def data_digest(self) -> str:
        """A digest of all rows: other rows make all stages of a seed again."""
        if not hasattr(self, "_digest"):
            folder = self.folder / "new_data"
            remove(folder)
            self.data.write(folder)
            self._digest = content_digest(folder, (".jsonl",))
            remove(folder)
        return self._digest

    def make_data(self, seed: int) -> dict[str, Any]:
        """Writes the rows, which are the same for all seeds."""
        return self.data.write(self.seed_folder(seed) / DATA)

    def _run_reward_model(self, seed: int) -> None:
        args = self.args
        folder = self.seed_folder(seed) / REWARD_MODEL
        self.stages.run_if_changed(
            stage(seed, REWARD_MODEL),
            "trained from the base on the comparisons",
            partial(self.reward_model, seed),
            settings={"labels": args.labels, "options": args.section("reward")},
            needs=[stage(seed, DATA)],
            reset=partial(remove, folder, self.seed_folder(seed) / f"{REWARD_MODEL}_data"),
            may_fail=True,
        )

    def reward_model(self, seed: int) -> dict[str, Any]:
        """Trains the reward model of a seed within the budget of labels."""
        data = self.seed_folder(seed) / DATA
        rows = self.comparisons(seed)
        heldout = rows_of_seed(data, "comparisons/test.jsonl")
        own_data = self.seed_folder(seed) / f"{REWARD_MODEL}_data"
        write_rows(rows, own_data / "train.jsonl")
        if heldout:
            write_rows(heldout, own_data / "test.jsonl")
        folder = self.seed_folder(seed) / REWARD_MODEL
        place = Place(self.seed_folder(seed), folder, seed)
        trained, measured = self.learners.reward_model(own_data, place, len(rows), has_test=bool(heldout))
        free_memory()
        own = {"own": asdict(trained.own), "judgments": count_labels(rows), "settings": dict(trained.settings)}
        return own | {"measured": measured}

    def comparisons(self, seed: int) -> list[Row]:
        """The comparisons that a seed may train on, within the budget of labels."""
        rows = rows_of_seed(self.seed_folder(seed) / DATA, "comparisons/all.jsonl")
        return within_budget(rows, self.args.labels, seed)

    def _run_system(self, seed: int, spec: SystemSpec) -> None:
        needs = [stage(seed, name) for name in (DATA, *spec.needs(self.args))]
        self.stages.run_if_changed(
            stage(seed, spec.name),
            spec.describe(),
            partial(self.make_system, seed, spec),
            settings=self.system_settings(spec),
            needs=needs,
            reset=partial(self.forget, seed, spec.name),
            may_fail=True,
        )

    def system_settings(self, spec: SystemSpec) -> dict[str, Any]:
        """What a system depends on beside the stages that it needs."""
        args = self.args
        options = {name: value for name, value in asdict(spec.options).items() if value is not None}
        settings: dict[str, Any] = options | dict(spec.training)
        if spec.options.demonstrations is not None:
            given = spec.options.demonstrations
            settings["demonstrations"] = f"{Path(given).name} {self.data.digest_of_own(given)}"
        snapshot_seconds = spec.snapshot_seconds(args)
        if snapshot_seconds is not None:
            settings["snapshot_seconds"] = snapshot_seconds
        if snapshot_seconds is not None or spec.options.max_seconds is not None:
            settings["clock"] = args.clock
        if spec.needs_reward and spec.kind != "best_of_n":
            settings |= {"temperature": args.temperature, "max_completion_length": args.max_completion_length}
            if not args.trains_reward_model:
                settings["reward"] = lineage_of(args.reward_model) if args.reward_model else args.reward_funcs
        if spec.needs_comparisons(args) or spec.options.uses_ratings(args):
            settings["labels"] = args.labels
        return settings

    def forget(self, seed: int, name: str) -> None:
        """Deletes what an earlier call left of a system."""
        folder = self.seed_folder(seed)
        remove(self.system_folder(seed, name), folder / "evaluation" / f"{name}.json")
        completions = folder / "completions"
        remove(*completions.glob(f"{name}.*"), *completions.glob(f"{name}@*"))

    def make_system(self, seed: int, spec: SystemSpec) -> dict[str, Any]:
        """Makes a system and writes its record."""
        folder = self.system_folder(seed, spec.name)
        folder.mkdir(parents=True, exist_ok=True)
        record = SystemMaker(self, seed).make(spec)
        record.save(folder)
        free_memory()
        return {"own": asdict(record.own), "labels": dict(record.labels), "completions": record.completions}

    def own_time(self, seed: int, name: str) -> Clock:
        """The time of training of a finished stage."""
        own = self.stages.measured(stage(seed, name)).get("own")
        return Clock(**own) if own is not None else Clock(0.0, 0.0)

    def all_needs(self, names: tuple[str, ...]) -> list[str]:
        """The stages with these names and all that they build on, each once."""
        found: dict[str, None] = {}
        for name in names:
            if name in self.specs:
                found |= dict.fromkeys(self.all_needs(self.specs[name].needs(self.args)))
            found[name] = None
        return list(found)

    # ---- The reward of training ----

    def reward_options(self, seed: int) -> dict[str, list[str]]:
        """The reward as `RewardArguments` has it."""
        if self.args.reward_funcs is not None:
            return {"reward_funcs": [self.args.reward_funcs]}
        return {"reward_model": [self.args.reward_model or str(self.seed_folder(seed) / REWARD_MODEL)]}

    def training_reward(self, seed: int) -> Callable[..., list[float]]:
        """The reward as a function of prompts and completions."""
        if self.args.reward_funcs is not None:
            return reward_function(self.args.reward_funcs, "reward_funcs")
        (name,) = self.reward_options(seed)["reward_model"]
        return RewardScorer.from_pretrained(name)

    # ---- Evaluation ----

    def records(self, seed: int) -> list[SystemRecord]:
        """The systems of a seed that can answer."""
        found = []
        for name in self.specs:
            if self.stages.is_finished(stage(seed, name)):
                found.append(SystemRecord.load(self.system_folder(seed, name)))
        return found

    def failures(self, seed: int) -> dict[str, str]:
        """Why systems of a seed failed."""
        reasons = {name: self.stages.error_of(stage(seed, name)) for name in self.specs}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @cached_property
    def base_options(self) -> dict[str, Any]:
        """Options of `load_policy` for all policies."""
        return {
            "dtype": self.model_args.dtype,
            "quantization_config": quantization_config(self.model_args),
            "attn_implementation": self.model_args.attn_implementation,
            "trust_remote_code": self.args.trust_remote_code,
        }

    def evaluation_setup(self, seed: int) -> EvaluationSetup:
        args = self.args
        reward_model, proxy = None, None
        if args.trains_reward_model:
            reward_model = REWARD_MODEL
        elif args.reward_funcs is not None or (args.reward_model and not Path(args.reward_model).is_dir()):
            proxy = self.training_reward(seed)
        elif args.reward_model is not None:
            reward_model = str(Path(args.reward_model).resolve())
        texts = rows_of_seed(self.seed_folder(seed) / DATA, "plain_text/heldout.jsonl")
        return EvaluationSetup(
            folder=self.folder,
            judges=self.judges,
            base_model=self.model_args.model_name_or_path,
            revision=self.model_args.revision,
            base_options=self.base_options,
            temperature=args.temperature,
            max_completion_length=args.max_completion_length,
            max_tokens_per_batch=args.max_tokens_per_batch,
            clock=args.clock,
            reward_model=reward_model,
            proxy=proxy,
            plain_texts=[row["text"] for row in texts],
            exact_match_items=self.items,
        )

    def earlier_results(self) -> list[dict[str, Any]]:
        """The results of other seeds, which earlier calls finished in the same folder."""
        results = []
        for path in sorted(self.folder.glob("seed-*/results.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["seed"] not in self.args.seeds and self.stages.is_finished(stage(result["seed"], EVALUATE)):
                results.append(result)
        return results

    def _run_evaluation(self, seed: int) -> dict[str, Any]:
        args = self.args
        records = self.records(seed)
        failures = self.failures(seed)
        settings = {
            "judges": args.judges,
            "temperature": args.temperature,
            "max_completion_length": args.max_completion_length,
            "clock": args.clock,
            "exact_match": args.exact_match,
            "failures": failures,
        }
        path = self.seed_folder(seed) / "results.json"
        self.stages.run_if_changed(
            stage(seed, EVALUATE),
            f"{len(records)} systems on {len(self.data.heldout)} held-out prompts",
            partial(self.evaluate, seed, records, failures),
            settings=settings,
            needs=[stage(seed, record.name) for record in records],
        )
        return json.loads(path.read_text(encoding="utf-8"))

    def evaluate(self, seed: int, records: list[SystemRecord], failures: Mapping[str, str]) -> dict[str, Any]:
        """Measures and compares the systems of a seed."""
        done: list[str] = []

        def on_system(name: str) -> None:
            self.progress.advance(len(done) / max(len(records), 1))
            done.append(name)

        reward_model = None
        if self.args.trains_reward_model and self.stages.is_finished(stage(seed, REWARD_MODEL)):
            reward_model = self.stages.measured(stage(seed, REWARD_MODEL))["measured"]
        evaluate(
            self.evaluation_setup(seed),
            seed,
            records,
            failures=failures,
            leaks=self.data.leaks,
            reward_model=reward_model,
            kinds={name: spec.kind for name, spec in self.specs.items()},
            on_system=on_system,
        )
        free_memory()
        return {"systems": len(records)}

    def pairs(self, seed: int) -> tuple[list[Row], int]:
        """Decided pairs for DPO within the budget of labels, and the number of judgments."""
        rows = self.comparisons(seed)
        return decided_pairs(rows), count_labels(rows)


def stage(seed: int, name: str) -> str:
    """The name of a stage of a seed, in the terminal and in the manifest."""
    return f"seed-{seed}/{name}"


def remove(*paths: Path) -> None:
    """Deletes files and folders that are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
