"""K completions behind one prompt give the numbers of plain rows: log-probabilities, values, losses and gradients."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2ForSequenceClassification, LlamaForCausalLM

from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.modeling.packing import Layout
from hf_rlhf_ext.modeling.probing import evaluating
from hf_rlhf_ext.ppo.state import NextRows

K = 4
ONE = {"num_generations": K, "max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}
KINDS = {
    "LoRA, head": {"critic": "head"},
    "LoRA, adapter": {"critic": "adapter", "kl_placement": "loss", "entropy_coef": 0.1},
    "LoRA, adapter, joint scoring": {"critic": "adapter", "joint_scoring": True},
    "LoRA, adapter, checkpointing": {"critic": "adapter", "activation_checkpointing": True},
    "LoRA, head, reentrant checkpointing": {
        "critic": "head",
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "whole, head": {"critic": "head", "peft_config": None},
    "whole, model, checkpointing": {"critic": "model", "peft_config": None, "activation_checkpointing": True},
    "parts": {"critic": "adapter", "max_tokens_per_batch": 40, "importance_sampling_correction": True},
}


def force(trainer, layout):
    """Makes every model use another layout, if it can."""
    for role in trainer.stack.roles.values():
        if not isinstance(role.model, BloomForCausalLM):  # it takes plain rows only
            role.layout = layout


def moved(trainer, size=0.05):
    """Moves all trained weights, so that ratios are not 1, and values and gradients are not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def measure(trainer, rollout, layout):
    """Scores, and the loss of a mini-batch with its gradients, in one layout."""
    force(trainer, layout)
    scored = trainer.roles.score(rollout.sequences, reference=True)
    numbers = {name: value.clone() for name, value in vars(scored).items()}
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.ppo.rollout = rollout
    rows = rollout.order[0]
    numbers["loss"] = trainer._add_gradients(NextRows(rows, rollout.completion_lengths.sum()))
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            numbers[f"gradient of {name}"] = parameter.grad.clone()
    return numbers


def assert_equal(got, expected, tolerance):
    assert got.keys() == expected.keys() and len(expected) > 8
    for name, wanted in expected.items():
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got[name], wanted, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


def compare(trainer, tolerance):
    rollout = trainer._make_rollout()
    assert rollout.per_prompt == K and rollout.completion_lengths.unique().numel() > 1  # ragged
    moved(trainer)
    plain = measure(trainer, rollout, Layout.PLAIN)
    moving = [name for name, value in plain.items() if name.startswith("gradient") and value.abs().max() > 1e-4]
    assert len(moving) > 8 and plain["values"].any() and plain["ref_logprobs"].any()
    for layout in (Layout.SEGMENTS, Layout.MASK):
        assert_equal(measure(trainer, rollout, layout), plain, tolerance)
    return rollout, plain


@pytest.mark.parametrize("kind", KINDS)
def test_scores_losses_and_gradients_are_those_of_plain_rows(make_trainer, kind):
    trainer = make_trainer(**(ONE | {"per_device_train_batch_size": 12} | KINDS[kind]))
    assert {trainer.stack.roles[name].layout for name in ("policy", "reference", "value")} == {Layout.SEGMENTS}
    compare(trainer, 5e-5)


def test_a_shared_prompt_passes_through_the_model_once(make_trainer):
    trainer = make_trainer(**ONE, per_device_train_batch_size=8, critic="adapter")
    rollout = trainer._make_rollout()
    passed = []
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: passed.append(args[0].numel()))
    n_prompt = int(rollout.prompt_lengths[::K].sum())
    n_completion = int(rollout.completion_lengths.sum())
    tokens = {}
    for layout in Layout:
        passed.clear()
        measure(trainer, rollout, layout)
        tokens[layout] = sum(passed)
    passes = 5  # three roles are scored, and two are trained
    assert tokens[Layout.PLAIN] == passes * rollout.input_ids.numel()
    assert tokens[Layout.SEGMENTS] <= passes * (n_prompt + n_completion)
    assert tokens[Layout.SEGMENTS] < tokens[Layout.MASK] < tokens[Layout.PLAIN]


def test_a_4_bit_base(make_trainer, tiny_config, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    model = load_base_model(str(tmp_path / "base"), load_in_4bit=True)
    trainer = make_trainer(model=model, critic="adapter", **ONE)
    assert trainer.stack.roles["policy"].layout is Layout.SEGMENTS
    compare(trainer, 2e-2)


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.bfloat16, {"critic": "adapter"}),
        (torch.bfloat16, {"critic": "adapter", "activation_checkpointing": True}),
        (torch.float32, {"critic": "head", "peft_config": None}),  # autocast: keys are in fp32, and values in bf16
    ],
)
def test_bf16_differs_by_its_rounding(make_trainer, tiny_config, dtype, options):
    model = LlamaForCausalLM(tiny_config).to(dtype)
    trainer = make_trainer(model=model, bf16=True, **options, **ONE)
    rollout = trainer._make_rollout()
    moved(trainer)
    plain = measure(trainer, rollout, Layout.PLAIN)
    for layout in (Layout.SEGMENTS, Layout.MASK):
        got = measure(trainer, rollout, layout)
        difference = (got["logprobs"] - plain["logprobs"]).abs().max()
        assert difference < 0.1
        print(f"bf16, {layout}: log-probabilities differ by at most {difference:.2g} nats")


def test_an_adapter_that_looks_for_its_start_in_every_row_takes_plain_rows(make_trainer, chat_tokenizer, caplog):
    invocation = chat_tokenizer(" me")["input_ids"]
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    data = Dataset.from_dict(
        {"prompt": [f"{word} me{end}" for word in ("Tell", "Show", "Ask") for end in ("", " now")]}
    )
    options = {"peft_config": config, "train_dataset": data, "critic": "adapter", "merge_for_generation": False}
    trainer = make_trainer(**ONE, per_device_train_batch_size=8, **options)
    (line,) = [line for line in caplog.messages if line.startswith("num_generations=4")]
    assert "aLoRA" in line and {role.layout for role in trainer.stack.roles.values()} == {Layout.PLAIN}
    moved(trainer)
    rollout = trainer._make_rollout()
    assert abs(float(rollout.metrics["sampling/logprob_mismatch"])) < 1e-5
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() > 1e-2  # the adapter does something


def other_value_model(kind, vocab_size):
    torch.manual_seed(1)
    sizes = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if kind == "bloom":  # takes no position ids
        return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, **sizes))
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=128, num_labels=1, **sizes)
    return GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("kind, layout", [("bloom", Layout.PLAIN), ("gpt2 with a score head", Layout.SEGMENTS)])
def test_a_value_model_of_another_architecture_has_its_own_layout(make_trainer, tiny_config, caplog, kind, layout):
    value_model = other_value_model(kind.split()[0], tiny_config.vocab_size)
    options = {"critic": "model", "value_model": value_model, "max_tokens_per_batch": 60}
    trainer = make_trainer(**(ONE | {"per_device_train_batch_size": 12} | options))
    roles = trainer.stack.roles
    assert (roles["policy"].layout, roles["value"].layout) == (Layout.SEGMENTS, layout)
    lines = [line for line in caplog.messages if line.startswith("num_generations=4")]
    assert len(lines) == (layout is Layout.PLAIN) and all("the value computes" in line for line in lines)
    rollout, _ = compare(trainer, 5e-5)
    # The parts fit the budget in the layout that needs more tokens.
    parts = trainer._parts(rollout, rollout.order[0], trainer.args.max_tokens_per_batch)
    for rows in parts:
        n_tokens = int(rollout.completion_lengths[rows].sum() + rollout.prompt_lengths[rows[::K]].sum())
        if layout is Layout.PLAIN:
            n_tokens = len(rows) * int(rollout.sequences.lengths[rows].max())
        assert n_tokens <= 60 or len(rows) == K


def test_double_precision(make_trainer):
    trainer = make_trainer(**(ONE | {"per_device_train_batch_size": 12, "critic": "adapter"}))
    rollout = trainer._make_rollout()
    moved(trainer)
    bare_model(trainer.model).double()
    trainer.model.double()
    sequences = rollout.sequences
    rows = (sequences.input_ids, sequences.prompt_lengths, sequences.mask)
    with evaluating(trainer.model):
        found = {}
        for layout in Layout:
            force(trainer, layout)
            for joint in (False, True):
                states = trainer.stack.hidden_states(["policy", "reference", "value"], *rows, joint=joint, per_prompt=K)
                found[layout, joint] = states
    for states in found.values():
        for role, hidden in states.items():
            assert hidden.dtype == torch.float64
            torch.testing.assert_close(hidden, found[Layout.PLAIN, False][role], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "critic, layout", [("head", Layout.SEGMENTS), ("adapter", Layout.SEGMENTS), ("adapter", Layout.MASK)]
)
def test_the_first_ratio_is_1_and_the_check_of_the_first_rollout_passes(make_trainer, critic, layout):
    trainer = make_trainer(**(ONE | {"per_device_train_batch_size": 12, "critic": critic, "max_tokens_per_batch": 50}))
    force(trainer, layout)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "val/ratio" in log]
    assert log["val/ratio"] == pytest.approx(1, abs=1e-6) and abs(log["policy/approxkl_avg"]) < 1e-10
    assert abs(log["objective/kl"]) < 1e-5 and abs(log["sampling/logprob_mismatch"]) < 1e-5
