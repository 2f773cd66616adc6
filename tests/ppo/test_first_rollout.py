"""The check of the first rollout: it stops a run whose policy is not one model, and says nothing about other runs."""

import copy
import math

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.engine import Samples, TransformersEngine
from hf_rlhf_ext.ppo.first_rollout import TRAINED, compare, limit_of, problem_of

ONE_STEP = {"max_steps": 1, "max_completion_length": 4}


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_refused(trainer, what, remedy):
    before = trained(trainer)
    with pytest.raises(UserError, match=f"check_first_rollout: .*{what}.*{remedy}") as error:
        trainer.train()
    assert "\n" not in str(error.value) and "check_first_rollout=False" in str(error.value)
    after = trained(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)


# Runs that are right


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_the_check_passes_and_changes_nothing(make_trainer, critic):
    weights = []
    for on in (True, False):
        trainer = make_trainer(
            critic=critic, check_first_rollout=on, max_steps=2, max_tokens_per_batch=20, temperature=0.7
        )
        trainer.train()
        weights.append((trained(trainer), torch.random.get_rng_state(), trainer.model.training))
    (checked, state, mode), (plain, plain_state, plain_mode) = weights
    assert all(torch.equal(checked[name], plain[name]) for name in plain)
    assert torch.equal(state, plain_state) and mode == plain_mode


def test_a_bf16_run_passes(make_trainer, tiny_config):
    make_trainer(model=LlamaForCausalLM(tiny_config).bfloat16(), bf16=True, **ONE_STEP).train()


def test_a_fully_trained_model_and_a_trained_adapter_pass(make_trainer, tiny_config):
    make_trainer(peft_config=None, **ONE_STEP).train()
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = get_peft_model(LlamaForCausalLM(tiny_config), config)
    make_trainer(model=adapter, peft_config=None, **ONE_STEP).train()


def test_dropout_that_is_left_on_is_no_fault(make_trainer, tiny_config):
    tiny_config.attention_dropout = 0.5
    make_trainer(disable_dropout=False, **ONE_STEP).train()


def test_the_reference_of_virtual_tokens_is_the_base(make_trainer):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(peft_config=virtual, **ONE_STEP)
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] != 0.0


# (a) scored and trained


def add_noise(trainer):
    def noise(module, args, output):
        return output + 0.1 * torch.randn_like(output) if module.training else output

    trainer.model.get_base_model().model.layers[0].mlp.register_forward_hook(noise)
    return trainer


def test_a_model_that_is_another_one_in_training_mode_is_refused(make_trainer):
    assert_refused(add_noise(make_trainer(**ONE_STEP)), "trained and scored", "training mode")
    assert_refused(add_noise(make_trainer(disable_dropout=False, **ONE_STEP)), "trained and scored", "training mode")
    trainer = add_noise(make_trainer(check_first_rollout=False, **ONE_STEP))
    trainer.train()
    assert trainer.state.global_step == 1


# (b) sampled and scored


class OtherWeights(TransformersEngine):
    """Samples from a copy of the policy whose weights are larger."""

    def sync(self, policy):
        other = copy.deepcopy(policy)
        with torch.no_grad():
            other.get_output_embeddings().weight.mul_(20)
        super().sync(other)


class OtherPrecision:
    """An engine of another library, whose log-probabilities are off by `error` nats."""

    def __init__(self, error):
        self.inner, self.error = TransformersEngine(), error

    def sync(self, policy):
        self.inner.sync(policy)

    def generate(self, prompt_ids, sampling, n=1):
        ids, logprobs = self.inner.generate(prompt_ids, sampling, n)
        if self.error is None:
            return Samples(ids, None)
        return Samples(ids, [[value + self.error for value in row] for row in logprobs])


def test_an_engine_that_samples_from_other_weights_is_refused(make_trainer):
    assert_refused(make_trainer(engine=OtherWeights(), **ONE_STEP), "sampled and scored", "merge_for_generation=False")


@pytest.mark.parametrize("options", [{"importance_sampling_correction": True}, {"top_k": 5}, {"top_p": 0.5}])
def test_tokens_that_are_sampled_from_another_distribution_on_purpose(make_trainer, options):
    make_trainer(engine=OtherWeights(), **ONE_STEP, **options).train()


def test_another_engine_may_have_another_precision(make_trainer):
    make_trainer(engine=OtherPrecision(0.05), **ONE_STEP).train()
    make_trainer(engine=OtherPrecision(None), **ONE_STEP).train()
    assert_refused(make_trainer(engine=OtherPrecision(1.0), **ONE_STEP), "sampled and scored", "in sync")


# (c) policy and reference


def moved(model, part):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["copy of the model", "copy of the adapter", "base"])
def test_a_reference_that_is_not_the_start_is_refused(make_trainer, tiny_config, kind):
    if kind == "copy of the model":
        trainer = make_trainer(peft_config=None, **ONE_STEP)
        moved(trainer.stack.roles["reference"].model, "layers.0.mlp")
    elif kind == "copy of the adapter":
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapter = get_peft_model(LlamaForCausalLM(tiny_config), config)
        trainer = make_trainer(model=adapter, peft_config=None, **ONE_STEP)
        moved(trainer.model, f".{trainer.stack.roles['reference'].adapter}.")
    else:
        trainer = make_trainer(**ONE_STEP)
        moved(trainer.model, "lora_B.default")
    assert_refused(trainer, "policy and its reference", "new trainer")


def test_only_the_first_rollout_of_a_new_run_is_checked(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "num_mini_batches": 1}
    trainer = make_trainer(**options)
    trainer.train()
    assert trainer.state.log_history[-2]["policy/approxkl_avg"] > 0  # it has moved away from its reference
    trainer.train()
    make_trainer(**(options | {"max_steps": 4})).train(resume_from_checkpoint=True)


# Tolerances


class Alone:
    """One process."""

    def sum_of(self, *numbers):
        return list(numbers)


def test_the_mean_over_tokens_is_compared_with_the_limit():
    first = torch.tensor([[-1.0, -2.0, 50.0], [-3.0, -1.5, -0.5]])
    second = torch.tensor([[-1.25, -2.0, 0.0], [-3.0, -1.5, -0.75]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # (0.25 + 0.25) / 5 tokens = 0.1; five tokens are allowed 1 + 2 / sqrt(5) = 1.894 times the limit.
    border = 0.1 / (1 + 2 / math.sqrt(5))
    assert problem_of([compare(TRAINED, first, second, mask, border * 1.001, 1.0)], Alone()) is None
    line = problem_of([compare(TRAINED, first, second, mask, border * 0.999, 1.0)], Alone())
    assert "differ by 0.1 nats per token" in line
    # At half the temperature, logits and their rounding errors are twice as large.
    assert problem_of([compare(TRAINED, first, second, mask, border * 0.501, 0.5)], Alone()) is None
    second[0, 0] = float("nan")
    assert "nan nats" in problem_of([compare(TRAINED, first, second, mask, 1.0, 1.0)], Alone())


def test_the_limit_follows_the_coarsest_dtype(tiny_llama, tmp_path):
    plain = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert limit_of(tiny_llama, plain) == 1e-3
    assert limit_of(tiny_llama, PPOConfig(str(tmp_path), use_cpu=True, bf16=True)) == 0.15
    assert limit_of(tiny_llama.half(), plain) == 0.05
    assert limit_of(tiny_llama.bfloat16(), plain) == 0.15


def test_neftune_is_refused(tmp_path):
    with pytest.raises(UserError, match="neftune_noise_alpha: .* leave it out"):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, neftune_noise_alpha=5.0)


# Models that read padding


def mismatch(trainer):
    return abs(trainer.state.log_history[0]["sampling/logprob_mismatch"])


def recurrent(kind, chat_tokenizer, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(chat_tokenizer),
        hidden_size=32,
        bos_token_id=None,
        eos_token_id=chat_tokenizer.eos_token_id,
        pad_token_id=chat_tokenizer.pad_token_id,
        **sizes,
    )
    return larger_weights(getattr(transformers, f"{kind}ForCausalLM")(config))


def larger_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # the small weights of a new model hardly depend on what is read
    return model


def test_prompts_of_unequal_length_are_sampled_apart_where_padding_is_read(make_trainer, chat_tokenizer, caplog):
    sizes = {"lru_width": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = recurrent("RecurrentGemma", chat_tokenizer, attention_window_size=64, **sizes)
    trainer = make_trainer(model=model, peft_config=None, **ONE_STEP)
    trainer.train()
    assert mismatch(trainer) < 1e-4
    (line,) = [line for line in caplog.messages if "reads the padding" in line]
    assert "RecurrentGemmaForCausalLM" in line and "equal length" in line


def test_rwkv_decodes_one_prompt_at_a_time(make_trainer, chat_tokenizer):
    # Its decoding with a cache mixes the rows of a batch in transformers 5.23, so that the check has to refuse it.
    sizes = {"attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "context_length": 128}
    model = recurrent("Rwkv", chat_tokenizer, **sizes)
    trainer = make_trainer(model=copy.deepcopy(model), peft_config=None, **ONE_STEP)
    assert_refused(trainer, "sampled and scored", "generation_batch_size=1")
    trainer = make_trainer(model=model, peft_config=None, generation_batch_size=1, **ONE_STEP)
    trainer.train()
    assert mismatch(trainer) < 1e-4


@pytest.mark.parametrize("batch_size", [None, 3])
def test_virtual_tokens_are_sampled_as_they_are_scored(make_trainer, tiny_config, batch_size):
    torch.manual_seed(0)
    model = larger_weights(LlamaForCausalLM(tiny_config))
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(model=model, peft_config=virtual, generation_batch_size=batch_size, **ONE_STEP)
    trainer.train()
    assert mismatch(trainer) < 1e-4


def test_batches_of_equal_length(tiny_llama):
    engine = TransformersEngine()
    engine.sync(tiny_llama)
    prompts = [[1] * n for n in (3, 5, 3, 2, 5, 3)]
    engine._reads_padding = True
    assert engine._batches(prompts, 2, None) == [[1, 4], [0, 2], [5], [3]]
    engine._reads_padding = False
    assert engine._batches(prompts, 6, None) == [[0, 1, 2, 3, 4, 5]]
    assert engine._batches(prompts, 4, None) == [[1, 4, 0, 2], [5, 3]]
