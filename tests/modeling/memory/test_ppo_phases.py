"""Phases of PPO in a plan against real runs on a CPU, and what is moved off a GPU against closed forms."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext import PPOConfig, PPOTrainer, RewardScorer, plan_memory
from hf_rlhf_ext.modeling.memory import planner
from hf_rlhf_ext.modeling.memory.live_bytes import LiveBytes, state_tensors
from hf_rlhf_ext.modeling.memory.planner import plan_request
from hf_rlhf_ext.ppo.engine import TransformersEngine

SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, vocab_size=2048, num_hidden_layers=4, tie_word_embeddings=True, pad_token_id=0)
SMALLER = LlamaConfig(**(SIZES | {"hidden_size": 64}), vocab_size=2048, num_hidden_layers=2, pad_token_id=0)
SHALLOW = LlamaConfig(**SIZES, vocab_size=2048, num_hidden_layers=2, tie_word_embeddings=True, pad_token_id=0)
LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
PROMPT = "abc " * 16
PROMPTS = [{"prompt": PROMPT}, {"prompt": PROMPT[:-8]}] * 8
"""Of several lengths, so that batches have padding."""
COMPLETION = 8


def one_score(config):
    return LlamaConfig(**(config.to_dict() | {"num_labels": 1}))


# ---- Real runs ----


class Measured(PPOTrainer):
    """A trainer that says to a counter of bytes which phase it is in."""

    live: LiveBytes
    phase: str | None = None

    @contextmanager
    def within(self, phase):
        """Inside the context, what is live belongs to a phase. All of an evaluation is one, but for the exact KL."""
        outer = self.phase
        if outer is None or phase == "exact KL":
            self.phase = phase
            self.live.begin(phase)
        yield
        if self.phase != outer:
            self.phase = outer
            self.live.begin(outer or "other")

    def mark(self):
        """Marks the calls of what samples and scores."""
        calls = [(self.tools.engine, "generate", "rollout"), (self.roles, "score", "scoring")]
        calls += [(self.rewards, "score", "reward"), (self.evaluator, "exact_kl", "exact KL")]
        for owner, name, phase in calls:
            setattr(owner, name, self._marked(getattr(owner, name), phase))

    def _marked(self, function, phase):
        def call(*args, **kwargs):
            with self.within(phase):
                return function(*args, **kwargs)

        return call

    def compute_loss(self, *args, role="policy", **kwargs):
        self.live.begin(f"{role} update")  # its backward pass follows
        return super().compute_loss(*args, role=role, **kwargs)

    def _add_ptx_gradients(self):
        with self.within("PPO-ptx"):
            return super()._add_ptx_gradients()

    def _finish_step(self):
        self.live.begin("other")
        super()._finish_step()

    def evaluate(self, *args, **kwargs):
        with self.within("evaluation"):
            return super().evaluate(*args, **kwargs)


def run(folder, tokenizer, *, dtype=torch.float32, rewards=None, models=(), further=None, **options):
    """Trains for two steps; returns the most bytes in each phase, the options, and tokens of a prompt."""
    torch.manual_seed(0)
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "num_ppo_epochs": 1,
        "max_completion_length": COMPLETION,
        "generation_kwargs": {"min_new_tokens": COMPLETION},
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "check_first_rollout": False,
        "max_kl": None,
    }
    args = PPOConfig(str(folder), **(defaults | options))
    policy = LlamaForCausalLM(CONFIG).to(dtype)
    live = LiveBytes()
    for model in (policy, *models):
        live.track((tensor for _, tensor in state_tensors(model)), "weights")
    with live:
        trainer = Measured(
            policy,
            rewards or (lambda completions, **columns: [float(len(text)) for text in completions]),
            args,
            Dataset.from_list(PROMPTS),
            processing_class=tokenizer,
            peft_config=LORA,
            engine=TransformersEngine(),
            **(further or {}),
        )
        trainer.live = live
        trainer.mark()
        trainer.train()
    peaks = {phase: sum(parts.values()) for phase, parts in live.peaks.items()}
    return peaks, args, len(tokenizer(PROMPT)["input_ids"])


def planned(args, n_prompt, *, config=CONFIG, dtype="float32", load_in_4bit=False, **further):
    options = {"reward_model": False, "device": "cpu", "prompt_tokens": n_prompt} | further
    model_args = SimpleNamespace(dtype=dtype, load_in_4bit=load_in_4bit)
    return plan_memory(config, "ppo", args, model_args=model_args, **options)


def traced(args, n_prompt, *, dtype="float32"):
    options = {"reward_model": False, "device": "cpu", "prompt_tokens": n_prompt}
    request = plan_request(CONFIG, "ppo", args, model_args=SimpleNamespace(dtype=dtype), **options)
    return planner._traced(request)


def compare(plan, measured, phases):
    """Planned bytes are those of the run in each phase, to a few percent."""
    found = {phase.name: phase.n_bytes for phase in plan.phases}
    errors = {phase: round(found[phase] / measured[phase] - 1, 4) for phase in phases}
    assert max(map(abs, errors.values())) < 0.03, errors  # the reward model tokenizes texts again
    assert plan.n_bytes == pytest.approx(max(measured.values()), rel=0.02)


def test_every_phase_needs_what_a_run_does(chat_tokenizer, tmp_path):
    measured, args, n_prompt = run(
        tmp_path,
        chat_tokenizer,
        critic="adapter",
        ptx_coef=0.5,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=12,
        further={
            "eval_dataset": Dataset.from_list(PROMPTS[:12]),
            "ptx_dataset": Dataset.from_list(
                [{"text": PROMPT + "d" * COMPLETION}, {"text": PROMPT + "d" * (COMPLETION - 2)}] * 4
            ),
        },
    )
    phases = ["rollout", "scoring", "policy update", "value update", "PPO-ptx", "evaluation"]
    compare(planned(args, n_prompt), measured, phases)
    # The exact KL is not the peak of the evaluation.
    found = traced(args, n_prompt)
    states = 2 * sum(n * size for n, size in found.trained)
    exact_kl = sum(found.phases["evaluation"]["exact KL"].values()) + states
    assert exact_kl == pytest.approx(measured["exact KL"], rel=0.03)


def test_completions_that_share_prompts_and_a_merge_in_bf16(chat_tokenizer, tmp_path):
    measured, args, n_prompt = run(
        tmp_path, chat_tokenizer, dtype=torch.bfloat16, critic="none", num_generations=4, per_device_train_batch_size=8
    )
    plan = planned(args, n_prompt, dtype="bfloat16")
    compare(plan, measured, ["rollout", "scoring", "policy update"])


def test_a_critic_and_reward_models_of_their_own(chat_tokenizer, tmp_path):
    reward_models = [LlamaForSequenceClassification(one_score(config)) for config in (SMALLER, CONFIG)]
    value_model = LlamaForCausalLM(SMALLER)
    measured, args, n_prompt = run(
        tmp_path,
        chat_tokenizer,
        rewards=[RewardScorer(model.eval(), chat_tokenizer) for model in reward_models],
        models=[*reward_models, value_model],
        further={"value_model": value_model},
        gradient_accumulation_steps=2,
    )
    plan = planned(args, n_prompt, reward_model=[SMALLER, reward_models[1]], value_model=value_model)
    compare(plan, measured, ["rollout", "reward", "scoring", "policy update", "value update"])


def test_what_is_there_for_a_moment_only_does_not_grow_with_the_number_of_layers(monkeypatch):
    args = options(num_generations=4, critic="none", max_completion_length=4)
    shallow = traced(args, 8, dtype="bfloat16").phases["rollout"]
    monkeypatch.setattr(planner, "_depths", lambda text, depth: (depth,))
    whole = traced(args, 8, dtype="bfloat16").phases["rollout"]
    assert shallow["merge"] == whole["merge"]
    assert whole["merge"]["temporary"] >= 128 * 344 * 4  # an update of the largest weight, in fp32
    assert shallow["shared prompts"] == whole["shared prompts"]


# ---- What is moved off a GPU, and what is there several times ----


def options(**given):
    return SimpleNamespace(**({"per_device_train_batch_size": 4, "bf16": False, "num_mini_batches": 2} | given))


def plan(args, **further):
    return planned(args, 24, config=SHALLOW, **further)


def parts(found):
    return {phase.name: {part.name: part.n_bytes for part in phase.parts} for phase in found.phases}


def n_adapter(r=16):
    """Weights of a LoRA adapter on all linear layers of `SHALLOW`."""
    h, kv, inner = 128, 64, 344
    return r * (2 * (h + h) + 2 * (h + kv) + 3 * (h + inner)) * SHALLOW.num_hidden_layers


def n_bytes(model):
    return sum({tensor.data_ptr(): tensor.nbytes for _, tensor in state_tensors(model)}.values())


def test_states_of_the_optimizer_that_are_moved_are_on_the_gpu_in_its_step_only():
    plans = [plan(options(offload_optimizer=away), device="cuda") for away in (False, True)]
    kept, moved = map(parts, plans)
    states = 2 * 4 * (2 * n_adapter() + 128 + 1)  # AdamW, in fp32, of policy and critic with its head
    assert kept["optimizer step"] == moved["optimizer step"]
    assert moved["optimizer step"]["optimizer"] == states
    for phase in kept.keys() - {"optimizer step"}:
        assert kept[phase] == moved[phase] | {"optimizer": states}
    saved = plans[0].peak.n_bytes - plans[1].peak.n_bytes
    assert 0 < saved <= states


def test_reward_models_that_are_moved_are_on_the_gpu_while_they_score_only():
    plans = [
        plan(options(offload_reward_model=away, critic="none"), device="cuda", reward_model=[SMALLER, None, SMALLER])
        for away in (False, True)
    ]
    kept, moved = map(parts, plans)
    weights = 2 * n_bytes(LlamaForSequenceClassification(one_score(SMALLER)))
    assert kept["reward"] == moved["reward"]
    assert moved["reward"]["reward model"] == weights
    for phase in kept.keys() - {"reward"}:
        assert kept[phase] == moved[phase] | {"reward model": weights}
        assert "reward model" not in moved[phase]


def test_in_a_run_on_the_cpu_nothing_is_moved():
    away = plan(options(offload_optimizer=True, offload_reward_model=True, critic="none"), reward_model=SMALLER)
    assert away.phases == plan(options(critic="none"), reward_model=SMALLER).phases


def test_all_reward_models_are_planned():
    one, two = (parts(plan(options(critic="head"), reward_model=models)) for models in ([None], [None, None]))
    further = two["scoring"]["adapters and heads"] - one["scoring"]["adapters and heads"]
    assert further == 4 * (n_adapter() + 128 + 1)  # an adapter on the base, with its head
    alone, beside = (
        parts(plan(options(critic="head"), reward_model=models)) for models in ([SMALLER], [SMALLER, SHALLOW])
    )
    weights = n_bytes(LlamaForSequenceClassification(one_score(SHALLOW)))
    for phase in alone:
        if phase != "reward":  # its peak is in the pass of the larger one
            assert beside[phase]["reward model"] - alone[phase]["reward model"] == weights


def test_a_reward_model_that_is_whole_is_not_quantized_with_the_policy(tmp_path):
    base = LlamaForCausalLM(SHALLOW)
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapter = tmp_path / "reward"
    get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(adapter)
    whole = n_bytes(LlamaForSequenceClassification(one_score(SHALLOW)))

    def weights(reward):
        found = parts(plan(options(critic="none"), load_in_4bit=True, reward_model=reward))
        return found["scoring"].get("reward model", 0)

    assert weights(SHALLOW) == whole
    assert weights(str(adapter)) == 0  # it is put on the base of the policy
    # It says that it was trained on a base in bf16, which the policy does not have.
    (adapter / "reward_normalization.json").write_text('{"base_dtype": "bfloat16"}')
    assert whole / 2 < weights(str(adapter)) < whole


def test_a_critic_starts_from_its_own_model_in_fp32():
    found = parts(plan(options(), dtype="bfloat16", value_model=SMALLER))
    critic = LlamaForCausalLM(SMALLER)
    assert found["rollout"]["critic model"] == n_bytes(critic)
    # Its output head gets no gradient, as a critic does not use it.
    trained = sum(p.numel() for p in critic.model.parameters()) + 64 + 1
    assert found["optimizer step"]["gradients"] == 4 * (trained + n_adapter())
    assert found["value update"]["gradients"] >= 4 * n_adapter()


def test_texts_of_ppo_ptx_are_assumed_as_long_as_a_prompt_with_its_completion():
    found = plan(options(ptx_coef=1.0, max_completion_length=16, critic="head"))
    assert "length of the texts of PPO-ptx not known: 40 tokens assumed" in found.notes
    assert "PPO-ptx" not in parts(plan(options(critic="head")))
