"""Evaluation during and after PPO: completions of a fixed set of prompts, sampled with a fixed seed."""

import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..compat import print_prompt_completions_sample
from ..data.text import decode_completion
from ..errors import UserError
from ..modeling.adapters import evaluating
from ..modeling.logprobs import chunked_kl, final_softcap
from .advantages import completion_mask
from .kl import kl_k1, kl_k3
from .rollout import pack_sequences
from .scoring import extra_columns
from .setup import encode_prompts


@dataclass
class EvaluatedCompletion:
    """One sampled completion: its text, each reward, and what it cost in KL.

    `score` is the weighted sum of the training rewards; `kl` and `kl_k3` are summed over its tokens, in nats. `logged`
    and `extra` are what reward functions gave to `log_metric` (for the batch it was in) and to `log_extra`.
    """

    prompt: str | list
    completion: str
    score: float
    rewards: dict[str, float]
    kl: float
    kl_k3: float
    n_tokens: int
    stopped: bool
    completion_ids: list[int] = field(default_factory=list, repr=False)
    logged: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class EvaluationMixin:
    """`evaluate` for `PPOTrainer`."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Samples a completion for each prompt and returns means of rewards, KL and length (`eval_…`).

        The completions go as a table to the trackers of `report_to`, and with `log_completions` some to the screen.
        The random state of training is untouched: a run with evaluation gives the weights of one without.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise UserError("evaluation needs an eval_dataset: pass one to the trainer, or set eval_strategy='no'.")
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        start = time.monotonic()
        rows = self.sample_and_score(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summarize(rows).items()}
        metrics |= self._exact_kl(dataset, rows, metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - start, 2)
        self.log(metrics)
        if self.is_world_process_zero():
            self._show_evaluation(rows, f"{metric_key_prefix}_completions")
        self._remember_evaluation(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sample_and_score(self, dataset: Dataset, *, seed: int | None = None) -> list[EvaluatedCompletion]:
        """Completions of the policy as it is now, with the rewards of `reward_funcs` and `eval_reward_funcs`.

        Args:
            dataset: rows with `prompt`, and the columns that the reward functions take.
            seed: of the sampling; `args.seed` if None, so that two policies are compared on common random numbers.
        """
        prompt_ids = encode_prompts(dataset, self.processing_class, self.args, "eval", self._max_positions)
        device = self.accelerator.device
        rows: list[EvaluatedCompletion] = []
        processes, here = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(prompt_ids) // processes)
        mine = range(min(here * share, len(prompt_ids)), min((here + 1) * share, len(prompt_ids)))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self.args.seed if seed is None else seed) + here)
            size = self.args.per_device_eval_batch_size
            for start in range(0, len(mine), size):
                batch = mine[start : start + size]
                rows += self._evaluate_batch([dataset[i] for i in batch], [prompt_ids[i] for i in batch])
        return rows if processes == 1 else gather_object(rows)

    def _evaluate_batch(self, examples: list[dict], prompt_ids: list[list[int]]) -> list[EvaluatedCompletion]:
        completion_ids, _ = self._generate(prompt_ids)
        logged: dict[str, list[float]] = defaultdict(list)
        extra, log_extra = extra_columns(len(examples))
        hooks = {"log_metric": lambda name, value: logged[name].append(value), "log_extra": log_extra}
        per_func = self._score(self.rewards, examples, completion_ids, **hooks).per_func
        scores = self.rewards.combine(per_func).tolist()
        named = {name: per_func[:, i].tolist() for i, name in enumerate(self.rewards.names)}
        if self.eval_rewards is not None:
            others = self._score(self.eval_rewards, examples, completion_ids, **hooks).per_func
            named |= {name: others[:, i].tolist() for i, name in enumerate(self.eval_rewards.names)}
        data = self._rescore(prompt_ids, completion_ids, reference=True)
        kl = kl_k1(data["logprobs"], data["ref_logprobs"]).sum(1).tolist()  # both are zero in the padding
        k3 = kl_k3(data["logprobs"], data["ref_logprobs"]).sum(1).tolist()
        return [
            EvaluatedCompletion(
                prompt=example["prompt"],
                completion=decode_completion(self.processing_class, ids),
                score=scores[i],
                rewards={name: values[i] for name, values in named.items()},
                kl=kl[i],
                kl_k3=k3[i],
                n_tokens=len(ids),
                stopped=ids[-1] in self._stop_ids,
                completion_ids=ids,
                logged={name: fmean(values) for name, values in logged.items()},
                extra={name: values[i] for name, values in extra.items()},
            )
            for i, (example, ids) in enumerate(zip(examples, completion_ids, strict=True))
        ]

    def _show_evaluation(self, rows: list[EvaluatedCompletion], title: str) -> None:
        """Prints the first completions, the same prompts each time, and sends all as a table to `report_to`."""
        prompts, texts = [row.prompt for row in rows], [row.completion for row in rows]
        figures = {name: [row.rewards[name] for row in rows] for name in rows[0].rewards}
        figures["kl"] = [row.kl for row in rows]
        extra = {name: [row.extra.get(name) for row in rows] for row in rows for name in row.extra}
        step, n = self.state.global_step, self.args.num_completions_to_print
        if self.args.log_completions:
            shown = ({name: values[:n] for name, values in columns.items()} for columns in (figures, extra))
            print_prompt_completions_sample(prompts[:n], texts[:n], next(shown), None, step, None, next(shown))
        columns = {"step": [step] * len(rows), "prompt": list(map(str, prompts)), "completion": texts}
        self._send_table(title, columns | figures | extra)

    @torch.no_grad()
    def _exact_kl(self, dataset: Dataset, rows: list[EvaluatedCompletion], prefix: str) -> dict[str, float]:
        """KL over the whole vocabulary at every token of the first few completions: a check of the estimates."""
        n = min(self.args.exact_kl_rows, len(rows))
        if n == 0:
            return {}
        prompt_ids = encode_prompts(dataset.select(range(n)), self.processing_class, self.args, "eval", sys.maxsize)
        ids, starts, lengths = pack_sequences(
            prompt_ids,
            [row.completion_ids for row in rows[:n]],
            self.processing_class.pad_token_id,
            self.accelerator.device,
        )
        mask = completion_mask(lengths, int(lengths.max()))
        total = 0.0
        with evaluating(self.policy), self._mixed_precision():
            for k in range(n):  # one at a time: two roles' states of every token are kept
                part = (ids[k : k + 1], starts[k : k + 1], mask[k : k + 1])
                hidden = self.stack.hidden_states(["policy", "reference"], *part, mixed=self._mixed_pass)
                total += chunked_kl(
                    hidden["policy"],
                    hidden["reference"],
                    self._output_head("policy"),
                    self._output_head("reference"),
                    temperature=self.args.temperature,
                    softcap=final_softcap(self.policy),
                    chunk_size=self.args.logprobs_chunk_size,
                ).sum()
        return {f"{prefix}_objective/kl_exact": float(total) / n}


def summarize(rows: list[EvaluatedCompletion]) -> dict[str, float]:
    """Means over completions, under the names that training logs use."""
    means = {
        "objective/scores": fmean(row.score for row in rows),
        "objective/kl": fmean(row.kl for row in rows),
        "objective/kl_k3": fmean(row.kl_k3 for row in rows),
        "completions/mean_length": fmean(row.n_tokens for row in rows),
        "completions/stopped_frac": fmean(row.stopped for row in rows),
    }
    means["objective/scores_std"] = pstdev(row.score for row in rows)
    for name in rows[0].rewards:
        given = [row.rewards[name] for row in rows if row.rewards[name] == row.rewards[name]]  # NaN: not scored
        means[f"rewards/{name}/mean"] = fmean(given) if given else float("nan")
        means[f"rewards/{name}/std"] = pstdev(given) if given else float("nan")
    for name in {name: None for row in rows for name in row.logged}:
        means[name] = fmean(row.logged[name] for row in rows if name in row.logged)
    return means
