"""The options that `--help` shows of each command, with short texts that have the unit; `--help-all` has the rest."""

from collections.abc import Mapping

MainOptions = Mapping[str, Mapping[str, str]]
"""Title of a group -> option -> its text. An empty text stands for the first sentence of the option's own help."""

_DATA = {
    "dataset_name": "File (json, jsonl, csv, parquet), folder or Hub id. Required.",
    "columns": "Roles of the columns if their names are not known, as '{prompt: question, ...}' or a .yaml file.",
    "train_rows": "Rows to train on, from the first one. Without it, all that are not held out.",
    "eval_rows": "Rows that are held out, by prompt, and evaluated on.",
}
_MODEL = {
    "model_name_or_path": "Folder, Hub id, .gguf file, or the embedded model of 135M parameters.",
    "load_in_4bit": "Quantize the frozen base to 4 bits (NF4).",
}
_NEW_ADAPTER = {
    "use_peft": "Train a LoRA adapter. If false, all weights.",
    "lora_r": "Rank of the adapter: its width.",
}
_STEPS = {
    "learning_rate": "Learning rate at its highest.",
    "num_train_epochs": "Passes over the rows.",
    "max_steps": "Optimizer steps. Overrides num_train_epochs; -1 does not.",
}
_FOLDER = {
    "output_dir": "Folder of the model and its report.",
    "overwrite": "Delete what an earlier run left in that folder.",
    "resume_from_checkpoint": "Go on from the last checkpoint in that folder (true), or from the one given.",
}

SFT: MainOptions = {
    "data": _DATA,
    "model and adapter": _MODEL | _NEW_ADAPTER,
    "training": _STEPS
    | {
        "per_device_train_batch_size": "Rows in a forward pass, on each device.",
        "gradient_accumulation_steps": "Forward passes in an optimizer step.",
        "max_length": "Tokens of prompt and completion; longer rows are cut.",
        "activation_checkpointing": "Save memory, and take more time (default: true).",
    },
    "run": _FOLDER
    | {
        "report_to": "Trackers, such as wandb or trackio.",
        "push_to_hub": "Push the result to the Hub, with its card.",
    },
}

REWARD: MainOptions = {
    "data": _DATA,
    "model and adapter": _MODEL | _NEW_ADAPTER,
    "training": _STEPS
    | {
        "per_device_train_batch_size": "Prompts in a forward pass, each with all its completions, on each device.",
        "max_length": "Tokens of a prompt with its longest completion.",
        "overflow": "What to do with longer rows.",
        "max_tokens_per_batch": "Tokens of a forward pass at most, which limits memory; the loss stays the same.",
        "members": "Reward models to train, for an ensemble.",
    },
    "run": _FOLDER | {"push_to_hub": "Push the result to the Hub, with its card."},
}

PPO: MainOptions = {
    "data": {
        "dataset_name": "Prompts: .txt with one a line, or file, folder or Hub id with a column prompt. Required.",
        "eval_rows": "Prompts that are held out and evaluated on, before and after.",
    },
    "rewards (one at least)": {
        "reward_model": "Folders or Hub ids of reward models.",
        "reward_funcs": "Reward functions: rewards.py:short, or built-in, as 'exact_match(column=answer)'.",
        "reward_weights": "One factor for each reward. Without it, 1 each.",
    },
    "model and adapter": _MODEL
    | {
        "model_name_or_path": "The first policy: folder or Hub id of an SFT adapter or of a base model.",
        "critic": "Where values come from: an adapter of their own, a head on the policy (less memory), or a model; or "
        "none, with num_generations. Without it, an adapter if the policy has one, else a head.",
    },
    "training": {
        "learning_rate": "Learning rate of the policy at its highest.",
        "max_steps": "Optimizer steps; num_ppo_epochs x num_mini_batches of them use one rollout. With -1, "
        "num_train_epochs passes over the prompts.",
        "per_device_train_batch_size": "Completions in a forward pass, on each device.",
        "num_generations": "Completions of each prompt in a rollout; batch sizes are multiples of it.",
        "num_mini_batches": "Batches of a rollout; the rollout has this many times the batch size.",
        "num_ppo_epochs": "Passes over each rollout.",
        "kl_coef": "Reward that is subtracted per nat of KL to the first policy.",
        "max_completion_length": "Tokens of a completion at most.",
    },
    "run": _FOLDER | {"push_to_hub": "Push the result to the Hub, with its card."},
}

ROUNDS: MainOptions = {
    "rounds": {
        "prompts": "Prompts: file, folder or Hub id with a column prompt. Required.",
        "rounds": "Rounds in all. A larger number on the same folder goes on.",
        "prompts_per_round": "Prompts that are judged in each round.",
        "completions": "Completions of each judged prompt.",
        "eval_prompts": "Held-out prompts on which policies are compared.",
    },
    "judging": {
        "judge": "Who judges: people on a page, simulated ones, both, or a file.",
        "people": "Names of the people, who each get a link.",
        "gold": "A reward function that nobody trains on, to measure by. Simulated people judge by it.",
    },
    "model": _MODEL | {"model_name_or_path": "The first policy: folder or Hub id of an SFT adapter or a base model."},
    "training": {
        "learner": "PPO with a reward model, or DPO on the judged pairs.",
        "start_from": "Each round trains the policy of the last one, or the first one.",
        "updates": "PPO updates in a round.",
        "rollout": "Completions of a PPO update.",
        "kl_coef": "Reward that is subtracted per nat of KL to the start of the round.",
        "learning_rate": "Learning rate of the policy at its highest.",
        "temperature": "Temperature of sampling.",
        "max_completion_length": "Tokens of a completion at most.",
    },
    "run": {
        "output_dir": "Folder of the run. The same command goes on where a run stopped.",
        "overwrite": "Start from the beginning, and delete what is there.",
    },
}

CHECK_REWARD: MainOptions = {
    "reward model and data": {
        "reward_model": "Folder or Hub id of the reward model. Required.",
        "dataset_name": "Comparisons: file, folder or Hub id. Those it was trained on are left out. Required.",
        "include_trained": "Check those too.",
        "dataset_test_split": "Split to check on, if the data have one that was held out.",
        "eval_rows": "Rows to check on: those that the training held out with the same number. 0: all rows.",
        "columns": _DATA["columns"],
        "dataset_format": "Name of the data format. Without it, it is found in the rows.",
        "category_column": "Column by whose values accuracy is reported too.",
    },
    "run": {
        "batch_size": "Sequences in a forward pass.",
        "output_dir": "Folder for report.json and evaluation.png.",
        "overwrite": "Delete what an earlier check left in that folder.",
    },
}

BENCH_REWARD: MainOptions = {
    "reward models and benchmarks": {
        "reward_model": "Folders or Hub ids of reward models; NAME=MODEL names one. Required.",
        "benchmark": "reward-bench, reward-bench-2, rm-bench, judgebench (from the Hub), NAME=FILE for their files, or "
        "your own comparisons: file, folder or Hub id. Required.",
        "prior_sets": "Add the four prior sets to reward-bench.",
        "limit": "Rows of each benchmark, as a random sample. Without it, all.",
        "seed": "Seed of the sample and of the intervals.",
    },
    "comparisons of your own": {
        "columns": _DATA["columns"],
        "category_column": "Column by whose values accuracy is reported too.",
        "include_trained": "Score rows too whose prompts the reward model was trained on.",
    },
    "run": {
        "max_length": "Tokens of a prompt with its completion; rows with more are left out and counted.",
        "max_tokens_per_batch": "Tokens of a forward pass at most, which limits memory.",
        "output_dir": "Folder for report.json and all scores. The same command goes on where it stopped.",
        "overwrite": "Delete the scores of an earlier run in that folder.",
        "write_card": "Write the results into the card of local reward models.",
    },
}

COMPARE: MainOptions = {
    "systems": {
        "systems": "The systems by name, each with its options, as a mapping in the config file. Required.",
        "seeds": "Seeds. Each trains all systems; more may be added later.",
    },
    "data": {
        "demonstrations": "Good answers, for SFT: file, folder or Hub id. Required.",
        "comparisons": "Which of two answers is better, for the reward model and DPO.",
        "labels": "Budget of judged pairs, or rated answers, the same for all systems. Without it, all.",
        "ratings_column": "Column of the demonstrations with ratings, for sft_top_rated.",
        "prompts": "Prompts to train on and to hold out. Without it, those of the comparisons.",
        "heldout_prompts": "Prompts to compare on. Without it, some of the prompts.",
        "eval_prompts": "Held-out prompts to compare on.",
        "plain_text": "Plain text, for ppo_ptx and the perplexity.",
        "reward_model": "A trained reward model, instead of training one.",
        "reward_funcs": "A reward function, instead of a reward model.",
    },
    "comparison": {
        "judges": "Judges that nothing is trained on: gold functions, reward models, functions of two answers, people.",
        "clock": "Compare by wall time, or by CPU time of the process.",
        "snapshot_seconds": "Seconds of training between snapshots, for comparisons at equal time and equal KL.",
        "temperature": "Temperature of sampling, for all systems.",
        "max_completion_length": "Tokens of an answer at most, for all systems.",
    },
    "run": {
        "model_name_or_path": "Base of all models: folder, Hub id, or the embedded one of 135M parameters.",
        "output_dir": "Folder of the run. The same command goes on where a run stopped.",
        "overwrite": "Start from the beginning, and delete what is there.",
    },
}

INIT: MainOptions = {
    "your files": {
        "files": "Files, folders or Hub ids. They may stand before the options. Without any, those in this folder.",
        "demonstrations": "File that is read as demonstrations, whatever else it may be.",
        "comparisons": "File that is read as comparisons.",
        "prompts": "File of which only the prompts are read.",
        "columns": "Roles of columns whose names are not known, as '{prompt: query, answers: [a, b], verdict: label}'.",
        "ignore": "Columns that need not be read, as a,b.",
    },
    "config": {
        "model_name_or_path": "The base model. Without it, one that fits this machine.",
        "output": "The config to write.",
        "output_dir": "Folder of the run, for the config.",
        "overwrite": "Replace the config if it exists.",
    },
}

PIPELINE: MainOptions = {
    "your files (any may be missing)": {
        "demonstrations": "Good answers, for SFT: file, folder or Hub id.",
        "comparisons": "Which of two answers is better, for a reward model: file, folder or Hub id.",
        "prompts": "Prompts for PPO: .txt with one a line, or file, folder or Hub id with a column prompt. Without it, "
        "those of the comparisons, else of the demonstrations.",
        "heldout_share": "Share of the rows of each file that nothing is trained on, by prompt.",
    },
    "rewards and models": {
        "reward_funcs": "Reward functions of your own, such as rewards.py:short; several as a,b.",
        "reward_model": "A trained reward model, instead of training one; several as a,b.",
        "reward_weights": "One factor for each reward, as 1.0,0.5: reward models first. Without it, 1 each.",
        "sft_policy": "The policy that PPO starts from, instead of demonstrations.",
        "model_name_or_path": "Base of all models: folder, Hub id, .gguf file, or the embedded one of 135M parameters.",
        "load_in_4bit": "Quantize the frozen base to 4 bits (NF4).",
        "use_peft": "Train LoRA adapters. If false, all weights.",
        "lora_r": "Rank of the adapters: their width.",
    },
    "sections (options of one stage)": {
        "sft": "Options of `hf-rlhf sft`, whose --help lists them, as '{num_train_epochs: 2}'. In a config: the line "
        "`sft:`, with indented lines such as `num_train_epochs: 2` under it.",
        "reward": "Options of `hf-rlhf reward`, in the same way.",
        "ppo": "Options of `hf-rlhf ppo`, in the same way.",
    },
    "run": {
        "output_dir": "Folder for data, models, report and cards. The same command goes on where a run stopped.",
        "overwrite": "Delete finished stages and start from the beginning.",
        "seed": "Seed of the split, sampling and training.",
        "require_ready": "Stop before PPO if the check finds a problem in the reward model.",
        "verbose": "Show all output of the trainers.",
    },
}

_ANSWERING = {
    "models": {
        "model": "Folder of a run, or models: folders, Hub ids, .gguf files, NAME=MODEL. Without any, the embedded "
        "model. They may also stand before the options.",
        "reward_model": "Folder or Hub id of the reward model. Without it, that of the run.",
        "reward_funcs": "Reward functions that are added to its score, such as rewards.py:short.",
        "load_in_4bit": "Quantize the base to 4 bits (NF4). Without it, as the adapters were trained.",
    },
    "answers": {
        "temperature": "Temperature of sampling. 0 takes the most probable token.",
        "greedy": "Take the most probable token.",
        "max_new_tokens": "Tokens of an answer at most.",
        "seed": "Seed of the sampling.",
        "system": "System text. Without it, that of the run; an empty text means none.",
    },
}

CHAT: MainOptions = _ANSWERING

GENERATE: MainOptions = {
    "files": {
        "prompts": "Prompts: .txt with one a line, or file, folder or Hub id with a column prompt. Required.",
        "columns": _DATA["columns"],
        "n_prompts": "Prompts to answer, from the first one. Without it, all.",
        "output": "File for the answers, one JSON object a line.",
        "overwrite": "Replace that file.",
        "batch_size": "Number of answers that are sampled together.",
    },
    **_ANSWERING,
}

BEST_OF_N: MainOptions = {
    "prompts and sampling": {
        "dataset_name": "Prompts: .txt with one a line, or file, folder or Hub id with a column prompt. Required.",
        "columns": _DATA["columns"],
        "n_prompts": "Prompts to use, from the first one. Without it, all.",
        "n": "Completions of each prompt.",
        "temperature": "Temperature of sampling.",
        "max_completion_length": "Tokens of a completion at most.",
        "batch_size": "Completions that are sampled, scored and saved together.",
        "seed": "Seed of the sampling.",
    },
    "policy and rewards (one at least)": {
        "model_name_or_path": "The policy: folder, Hub id, .gguf file, or the embedded model of 135M parameters.",
        "reward_model": "Folder or Hub id of the reward model by which the best is chosen.",
        "reward_funcs": "Reward functions of your own, such as rewards.py:short.",
        "reward_weights": "One factor for each reward, that of the reward model first. Without it, 1 each.",
        "gold": "A reward that chooses nothing and measures the best: gold.py:score, or a reward model's folder.",
        "load_in_4bit": "Quantize the policy's base to 4 bits (NF4). Without it, as the adapter was trained.",
    },
    "output": {
        "write": "Files to write: demonstrations (the best), comparisons (best and worst), answers (all).",
        "output_dir": "Folder of samples, rows and report. The same command goes on where a run stopped.",
        "overwrite": "Delete samples of an earlier run, and sample again.",
    },
}

PLAN: MainOptions = {
    "plan": {
        "stage": "The command to plan: sft, reward or ppo, with any of its options. Without it, by the config's name.",
        "card": "Memory of the GPU, such as 12GB; or auto: the GPU of this machine; or cpu.",
        "prompt_tokens": "Tokens of the longest prompt. Without it, a number is assumed, and said.",
        "completion_tokens": "Tokens of the longest completion. Without it, as many as the options allow.",
        "completions_per_prompt": "Completions of each prompt of a reward model's comparisons.",
        "advice": "Look for what else fits, and for what to change. If false, the answer comes sooner.",
        "json": "File for the plan as JSON; - prints it, and nothing else.",
        "plot": "PNG file for a plot of the plan.",
    },
}
