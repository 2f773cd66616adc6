"""What `PPOTrainer` logs, under the names of TRL's last PPO trainer (`metrics.names` has units and meanings)."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.integrations import TensorBoardCallback

from ..compat import print_prompt_completions_sample
from ..data.text import decode_completion
from .advantages import explained_variance
from .kl import kl_k1, kl_k3
from .losses import masked_mean


class FiguresMixin:
    """Figures for `PPOTrainer`: each log reports means since the last one."""

    def _record(self, name: str, value: Tensor | float, count: float = 1.0) -> None:
        """Adds this process's share `value` of a figure; `count` is its weight in the mean, the same everywhere."""
        self._sums[name] += value.detach() if isinstance(value, Tensor) else value
        self._counts[name] += count

    def _observe(self, name: str, value: Tensor | float) -> None:
        """Adds a figure that every process has by itself: the mean over processes counts."""
        self._record(name, value / self.accelerator.num_processes)

    def _record_rollout(self, data: dict[str, Tensor], shaped: Tensor, kl: Tensor, returns: Tensor) -> None:
        mask, lengths, logprobs = data["mask"], data["completion_lengths"], data["logprobs"]
        n, scores = len(lengths), data["scores"]
        non_score = -self.kl_coef * masked_mean(kl, mask, n)
        figures = {
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": masked_mean(data["entropies"], mask, n),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "objective/rlhf_reward": shaped.mean() + non_score,
            "objective/non_score_reward": non_score,
            "val/num_eos_tokens": data["stopped"].sum(),
            "val/explained_variance": explained_variance(data["values"], returns, mask),
            "completions/mean_length": lengths.float().mean(),
            "completions/stopped_frac": data["stopped"].float().mean(),
            "sampling/logprob_mismatch": masked_mean(data["sampled_logprobs"] - logprobs, mask),
            "episode": (self._rollouts + 1) * n,
        }
        if "ref_logprobs" in data:
            figures["objective/kl"] = masked_mean(kl_k1(logprobs, data["ref_logprobs"]), mask, n)
            figures["objective/kl_k3"] = masked_mean(kl_k3(logprobs, data["ref_logprobs"]), mask, n)
        if "clipped" in data:
            figures["rewards/clipped_frac"] = data["clipped"].float().mean()
        for i, name in enumerate(self.rewards.names):
            given = data["per_func"][:, i][~data["per_func"][:, i].isnan()]
            if len(given):
                figures[f"rewards/{name}/mean"] = given.mean()
                figures[f"rewards/{name}/std"] = given.std(correction=0)
        self._last_rollout = {name: float(value) for name, value in figures.items()}
        for name, value in figures.items():
            self._observe(name, value)

    def _record_update(self, loss: Tensor, entropy: Tensor, stats: dict[str, Tensor], share: float) -> None:
        figures = {"loss/policy_avg": loss, "policy/entropy_avg": entropy, "val/ratio": stats["ratio"]}
        figures |= {"policy/clipfrac_avg": stats["clipfrac"], "policy/approxkl_avg": stats["approxkl"]}
        for name, value in figures.items():  # each is a share of the mini-batch's mean
            self._record(name, value, share)
        self._clipped = [self._clipped[0] + stats["clipfrac"], self._clipped[1] + share]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation and the summary at the end carry their own figures
            sums = {name: float(total) for name, total in self._sums.items()}
            for other in gather_object([sums])[1:] if self.accelerator.num_processes > 1 else []:
                for name, value in other.items():
                    sums[name] = sums.get(name, 0.0) + value
            logs |= {name: total / self._counts.get(name, 1.0) for name, total in sums.items()}
            logs["lr_value"] = self.optimizer.param_groups[-1]["lr"]
            self._sums.clear()
            self._counts.clear()
            if self.args.log_completions and self._completions is not None and self.is_world_process_zero():
                self._show_completions(**self._completions)
                self._completions = None
        super().log(logs, start_time)

    def _show_completions(
        self, examples: list[dict], completion_ids: list[list[int]], per_func: Tensor, extra: dict[str, list]
    ) -> None:
        """Prints a sample of completions, and sends all of them as a table where `report_to` takes one."""
        prompts = [example["prompt"] for example in examples]
        texts = [decode_completion(self.processing_class, ids) for ids in completion_ids]
        rewards = {name: per_func[:, i].tolist() for i, name in enumerate(self.rewards.names)}
        step, shown = self.state.global_step, self.args.num_completions_to_print
        print_prompt_completions_sample(prompts, texts, rewards, None, step, shown, extra)
        columns: dict[str, list[Any]] = {"step": [step] * len(texts), "prompt": list(map(str, prompts))}
        self._send_table("completions", columns | {"completion": texts} | rewards | extra)

    def _send_table(self, title: str, columns: dict[str, list[Any]]) -> None:
        """Sends a table to the trackers in use: as a table to Weights & Biases and trackio, as text to TensorBoard."""
        import pandas as pd

        table = pd.DataFrame(columns)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                with pd.option_context("display.max_colwidth", None):
                    callback.tb_writer.add_text(title, table.to_html(index=False), self.state.global_step)
                callback.tb_writer.flush()
        for name in {"wandb", "trackio"} & set(self.args.report_to):
            tracker = __import__(name)
            if name == "trackio" or tracker.run is not None:
                tracker.log({title: tracker.Table(dataframe=table)})


def reduced(tensors: list[Tensor], accelerator) -> None:
    """Sums tensors over processes, in place, in one message."""
    if accelerator.num_processes == 1 or not tensors:
        return
    flat = accelerator.reduce(torch.cat([tensor.flatten().float() for tensor in tensors]), reduction="sum")
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
