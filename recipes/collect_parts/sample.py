"""Samples completions for people to judge, from one or several policies.

hf-rlhf collect sample --prompts prompts.jsonl --policy sft=runs/sft ppo=runs/ppo --output tasks.jsonl
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task, write_tasks
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import (
    check_at_least,
    check_between,
    check_file_exists,
    check_new_file,
    check_writable,
    print_next,
)

# Modules that load torch are imported in functions: `--help` and a wrong option should not wait for them.
if TYPE_CHECKING:
    from hf_rlhf_ext.collect.sampling import PolicySpec
    from hf_rlhf_ext.collect.selection import ChosenPrompts

WAYS_TO_CHOOSE = ("uniform", "mix", "disagreement")
"""Values of `--choose`, as in `hf_rlhf_ext.collect.selection.HOW`."""
CATEGORY = "category"
"""Usual column of the use case, which need not be there."""
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns for the chat template. Prompts that have them are dropped and counted, as people would not see them."""
MOST_COMPLETIONS = 9
"""Largest number of completions of a prompt: the page ranks them by the keys 1 to 9."""


@dataclass
class SampleArguments:
    """Prompts, policies, sampling, and where the tasks go."""

    prompts: str | None = field(default=None, metadata={"help": "Prompts: a Hub id, a file, or a folder."})
    split: str = field(default="train", metadata={"help": "Split of the prompts."})
    subset: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of prompts on the Hub, where there are several."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of prompts on the Hub."})
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, as YAML or JSON text: '{prompt: question, system: instruction}'. If "
            "`None`, the column `prompt`."
        },
    )
    category_column: str = field(default=CATEGORY, metadata={"help": "Column with the use case of a prompt."})
    policy: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or several policies, each as NAME=LOCATION: a folder, a Hub id, a `.gguf` file, or "
            "embedded:smollm2-135m-instruct. LOCATION@REVISION names a commit on the Hub."
        },
    )
    k: int = field(default=2, metadata={"help": "Completions of each prompt, at most 9. 1 gives answers to rate."})
    n_prompts: int | None = field(
        default=None,
        metadata={"help": "Number of prompts to choose, among those that --store does not have. If `None`, all."},
    )
    choose: str = field(
        default="uniform",
        metadata={
            "help": "How prompts are chosen: `uniform`ly, by the `mix` of InstructGPT's use cases, or those on whose "
            "completions a reward ensemble has the largest `disagreement`.",
            "choices": list(WAYS_TO_CHOOSE),
        },
    )
    reward_model: list[str] | None = field(
        default=None,
        metadata={"help": "Reward ensemble for --choose disagreement: one folder or Hub id, or those of its members."},
    )
    temperature: list[float] = field(
        default_factory=lambda: [0.8], metadata={"help": "One or several temperatures, spread over the completions."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1.0 samples from all tokens."})
    max_new_tokens: int = field(default=256, metadata={"help": "Largest number of tokens of a completion."})
    batch_size: int = field(default=64, metadata={"help": "Completions that are sampled together."})
    seed: int = field(default=0, metadata={"help": "Seed for the choice of prompts and for sampling."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the policies in 4 bits."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of the policies. Only use it if you have read the code."}
    )
    wanted: int = field(default=1, metadata={"help": "Number of people who judge each task."})
    batch: str | None = field(default=None, metadata={"help": "Name of these tasks, such as round-1. `None`: none."})
    output: str | None = field(default=None, metadata={"help": "File for the tasks, one JSON object a line."})
    store: str | None = field(
        default=None, metadata={"help": "Store to add the tasks to, also while people work. May be used with --output."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the file of --output if it exists."})

    def __post_init__(self):
        if self.prompts is None:
            raise UserError("prompts is required: a file or a Hub id (--prompts prompts.jsonl).")
        if not self.policy:
            raise UserError("policy is required: one or several (--policy sft=runs/sft base=alice/my-base).")
        if self.output is None and self.store is None:
            raise UserError("output is required: a file (--output tasks.jsonl), or a store (--store judgments.sqlite).")
        self.check_files()
        check_at_least(self, n_prompts=1, max_new_tokens=1, batch_size=1, wanted=1, seed=0)
        check_between(self, k=(1, MOST_COMPLETIONS))
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        for temperature in self.temperature:
            if not 0 < temperature < float("inf"):
                raise UserError(f"temperature must be above 0, got {temperature:g}: 0 always gives the same answer.")
        if self.batch is not None and not self.batch.strip():
            raise UserError("batch: the name is empty: write --batch round-1, or leave it out.")
        if (self.choose == "disagreement") != (self.reward_model is not None):
            raise UserError(
                "choose: disagreement needs --reward_model, and no other way uses it: pass both or neither."
            )
        if self.choose == "disagreement" and self.k == 1:
            raise UserError("k: --choose disagreement compares completions of a prompt: pass --k 2 or more.")
        if self.choose != "uniform" and self.n_prompts is None:
            raise UserError(f"choose: {self.choose} needs a number of prompts: pass --n_prompts.")

    def check_files(self) -> None:
        """Checks the outputs now, so that nothing is sampled in vain."""
        if self.output is not None:
            inputs = {"prompts": self.prompts, "store": self.store}
            check_new_file(self.output, "output", overwrite=self.overwrite, inputs=inputs)
        if self.store is not None:
            check_writable(self.store, "store")
            if Path(self.store).exists():
                Store(self.store).close()  # refuses a file that is no store


ARGUMENTS = (SampleArguments,)


def read_policy(text: str) -> "PolicySpec":
    """Reads NAME=LOCATION or NAME=LOCATION@REVISION. Without a name, it is the last part of the location."""
    from hf_rlhf_ext.collect.sampling import PolicySpec

    name, equals, location = text.partition("=")
    if not equals or "/" in name:  # a folder may have = in its name
        name, location = "", text
    revision = None
    if "@" in location and not Path(location).exists():
        location, _, revision = location.rpartition("@")
    name = name or location.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    if not name or not location:
        raise UserError(f"policy: {text!r} has no name or no location: write --policy sft=runs/sft.")
    if revision is not None and Path(location).exists():
        raise UserError(f"policy: {location} is on this disk, so it has no revision: leave @{revision} out.")
    return PolicySpec(name, location, revision)


def read_policies(texts: list[str]) -> list["PolicySpec"]:
    """Reads all policies. Raises `UserError` if two have the same name."""
    policies: dict[str, Any] = {}
    for text in texts:
        policy = read_policy(text)
        if policy.name in policies:
            raise UserError(f"policy: two are called {policy.name!r}: write --policy NAME=LOCATION with other names.")
        policies[policy.name] = policy
    return list(policies.values())


def read_prompts(args: SampleArguments) -> list[dict[str, Any]]:
    """Reads the rows with prompts. Each has `prompt`, `source` and `row`, and `category` if there is one."""
    from hf_rlhf_ext.cli.options import DataArguments
    from hf_rlhf_ext.data.media import refuse_media_columns
    from hf_rlhf_ext.readers.formats import load_rows, with_prompts
    from hf_rlhf_ext.readers.prompts import blank_lines_of

    check_file_exists(args.prompts, "prompts")
    rows = load_rows(args.prompts, args.split, args.revision, config=args.subset)
    refuse_media_columns(rows, where=f"prompts: {args.prompts}")
    columns = DataArguments(dataset_name=args.prompts, columns=args.columns).column_roles()
    if columns is not None:
        rows = with_prompts(rows, columns, source=args.prompts)
    if "prompt" not in rows.column_names:
        raise UserError(
            f"prompts: {args.prompts} has no column `prompt`, only {', '.join(rows.column_names)}: name it with "
            "--columns '{prompt: question}'."
        )
    if args.category_column not in (*rows.column_names, CATEGORY):
        known = ", ".join(rows.column_names)
        raise UserError(f"category_column: {args.prompts} has no column {args.category_column!r}, only {known}.")
    say_unread_columns(rows.column_names, args)
    n_blank = len(blank_lines_of(args.prompts))
    if n_blank:
        print(f"{args.prompts}: {n_blank} blank lines skipped")
    prompts = []
    for number, row in enumerate(rows):
        prompts.append({**row, **origin_of(row, number, args)})
    return prompts


def say_unread_columns(names: list[str], args: SampleArguments) -> None:
    """Prints the columns that no task will have, as a system text in one of them would be missing in the prompt."""
    read = {"prompt", "source", "row", *TEMPLATE_COLUMNS, args.category_column}
    unread = [name for name in names if name not in read]
    if unread and args.columns is None:
        print(f"{args.prompts}: columns not read: {', '.join(unread)} (--columns reads system texts and histories)")


def origin_of(row: dict[str, Any], number: int, args: SampleArguments) -> dict[str, Any]:
    """Source, row and category of a prompt. Numbers of classes and empty cells are usual in tables."""
    source = row.get("source")
    if not isinstance(source, str) or not source:
        source = Path(args.prompts).name
    row_number = row.get("row")
    if not isinstance(row_number, int):
        row_number = number
    category = row.get(args.category_column)
    if isinstance(category, int):
        category = str(category)
    return {"source": source, "row": row_number, "category": category or None}


def run(args: SampleArguments) -> None:
    """Chooses prompts, samples, and writes the tasks."""
    policies = read_policies(args.policy)
    with library_output(verbose=False):
        prompts = read_prompts(args)
        sampling = {
            "k": args.k,
            "temperatures": args.temperature,
            "top_p": args.top_p,
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "wanted": args.wanted,
            "batch": args.batch,
            "load_in_4bit": args.load_in_4bit,
            "trust_remote_code": args.trust_remote_code,
        }
        chosen = choose(prompts, policies, sampling, args)
        print(f"{args.prompts}: {len(chosen.rows)} of {len(prompts)} prompts chosen ({args.choose})")
        for reason, count in chosen.left_out.items():
            print(f"  {count} left out: {reason}")
        tasks = chosen.tasks
        if tasks is None:  # `disagreement` has sampled already
            tasks = sample(chosen.rows, policies, sampling, args)
    if not tasks:
        raise UserError("no tasks are left, see above: change the prompts, --temperature, --k or --policy.")
    save(tasks, args)


def choose(
    prompts: list[dict[str, Any]], policies: list["PolicySpec"], sampling: dict[str, Any], args: SampleArguments
) -> "ChosenPrompts":
    """Chooses `n_prompts` different prompts that the store does not have, or takes all that are not repeated."""
    from hf_rlhf_ext.collect.selection import choose_prompts

    if args.n_prompts is None:
        return all_distinct(prompts)
    judged_already = []
    if args.store is not None and Path(args.store).is_file():
        with Store(args.store) as store:
            judged_already = [task.prompt for task in store.tasks()]
    options: dict[str, Any] = {}
    if args.choose == "disagreement":
        ensemble = args.reward_model[0] if len(args.reward_model) == 1 else args.reward_model
        options = {"ensemble": ensemble, "policies": policies, **sampling}
    return choose_prompts(prompts, args.n_prompts, how=args.choose, seed=args.seed, exclude=judged_already, **options)


def all_distinct(prompts: list[dict[str, Any]]) -> "ChosenPrompts":
    """All prompts in their order, without those that repeat an earlier one."""
    from hf_rlhf_ext.collect.selection import ChosenPrompts
    from hf_rlhf_ext.data.text import is_text, text_key

    distinct: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(prompts):
        prompt = row["prompt"]
        # Something else than a prompt is refused with its row number when it is sampled.
        key = text_key(prompt) if is_text(prompt) else number
        distinct.setdefault(key, row)
    left_out = {}
    if len(distinct) < len(prompts):
        left_out["repeats an earlier prompt"] = len(prompts) - len(distinct)
    return ChosenPrompts(list(distinct.values()), left_out=left_out)


def sample(
    prompts: list[dict[str, Any]], policies: list["PolicySpec"], sampling: dict[str, Any], args: SampleArguments
) -> list[Task]:
    """Samples completions, and prints what was dropped and why."""
    from hf_rlhf_ext.collect.sampling import sample_tasks

    sampled = sample_tasks(prompts, policies, seed=args.seed, **sampling)
    print(sampled.summary())
    for dropped in sampled.dropped[:5]:
        row = prompts[dropped.row]
        print(f"  dropped: {row['source']} row {row['row']}: {dropped.reason}")
    return sampled.tasks


def save(tasks: list[Task], args: SampleArguments) -> None:
    """Writes the tasks to the file, to the store, or to both, and prints the next command."""
    if args.output is not None:
        write_tasks(args.output, tasks)
        print(f"Tasks: {args.output}")
    if args.store is not None:
        with Store(args.store) as store:
            added = store.add_tasks(tasks)
        print(f"Store: {args.store}, {added.added} tasks added, {added.known} known already")
        print_next(["collect", "serve", "--store", args.store, "--people", "anna,tom"])
        return
    print_next(["collect", "serve", "--store", "judgments.sqlite", "--tasks", args.output, "--people", "anna,tom"])
