"""Several completions per prompt: options, the order of rows, shares of processes, parts, and the position in the data.

`test_generations_numbers.py` has the equality with plain rows, and `test_generations_runs.py` whole runs.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.packing import Layout
from hf_rlhf_ext.ppo.batching import budget_chunks, prompt_chunks
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.engine import Samples, Sampling
from hf_rlhf_ext.ppo.engine_check import checked_samples, takes_n
from hf_rlhf_ext.ppo.experience import ExperienceMaker
from hf_rlhf_ext.ppo.prompts import with_max_steps
from hf_rlhf_ext.ppo.ranks import Ranks
from hf_rlhf_ext.ppo.rollout import Rollout, pack_sequences
from hf_rlhf_ext.ppo.state import PPOState, geometry, sizes_of
from hf_rlhf_ext.ppo.stretch import Sizes, Stretch, said_of_other_sizes, stretch_after

CPU = torch.device("cpu")


def ranks_of(count, index):
    """Stands for one of several processes."""
    return Ranks(SimpleNamespace(num_processes=count, process_index=index, device=CPU))


def config(folder, **options):
    return PPOConfig(str(folder), use_cpu=True, bf16=False, **options)


# Options


@pytest.mark.parametrize("batch, generations, remedy", [(6, 4, 8), (2, 3, 3), (8, 16, 16)])
def test_a_batch_that_would_divide_a_prompt_is_refused_in_one_line(tmp_path, batch, generations, remedy):
    with pytest.raises(UserError) as error:
        config(tmp_path, per_device_train_batch_size=batch, num_generations=generations)
    message = str(error.value)
    assert message.startswith(f"num_generations={generations}") and "\n" not in message
    assert f"per_device_train_batch_size={batch}" in message
    assert f"set per_device_train_batch_size={remedy}" in message


@pytest.mark.parametrize("value", [0, -1])
def test_less_than_one_completion_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="num_generations"):
        config(tmp_path, num_generations=value)


def test_batch_sizes_count_completions(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "num_mini_batches": 2}
    args = config(tmp_path, num_generations=4, **sizes)
    assert (args.minibatch_size, args.rollout_size, args.prompts_per_rollout) == (24, 48, 12)
    assert config(tmp_path, **sizes).prompts_per_rollout == 48


# Order, shares and micro-batches

GEOMETRIES = st.fixed_dictionaries(
    {
        "num_generations": st.integers(1, 4),
        "groups": st.integers(1, 3),
        "gradient_accumulation_steps": st.integers(1, 3),
        "num_mini_batches": st.integers(1, 3),
        "num_ppo_epochs": st.integers(1, 2),
    }
)


@settings(max_examples=40, deadline=None)
@given(sizes=GEOMETRIES, count=st.integers(1, 3), seed=st.integers(0, 99))
def test_no_order_share_or_micro_batch_divides_a_prompt(tmp_path_factory, sizes, count, seed):
    per_prompt = sizes["num_generations"]
    sizes = {name: size for name, size in sizes.items() if name != "groups"} | {
        "per_device_train_batch_size": sizes["groups"] * per_prompt
    }
    args = config(tmp_path_factory.getbasetemp(), **sizes)
    size = args.rollout_size * count
    maker = SimpleNamespace(args=args, ranks=SimpleNamespace(gather=lambda value: [value]))
    torch.manual_seed(seed)
    order = ExperienceMaker._orders(maker, size)
    assert order.shape == (args.num_ppo_epochs, size)
    lengths, numbers = torch.arange(1, size + 1), torch.zeros(size, 1)
    rollout = Rollout(order, lengths, lengths, numbers, numbers, numbers, order)
    states = [PPOState(kl_coef=0.1, rollout=rollout) for _ in range(count)]
    for _ in range(args.num_ppo_epochs):
        used = []
        for _ in range(args.num_mini_batches * args.gradient_accumulation_steps):
            for index, state in enumerate(states):
                rows = state.next_micro_batch(args, ranks_of(count, index)).rows
                assert len(rows) == args.per_device_train_batch_size  # each process has equally many
                groups = rows.view(-1, per_prompt).tolist()
                assert all(group == list(range(group[0], group[0] + per_prompt)) for group in groups)
                assert all(group[0] % per_prompt == 0 for group in groups)
                used += rows.tolist()
        assert sorted(used) == list(range(size))


def test_with_one_completion_orders_and_shares_are_those_of_before(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=6, num_ppo_epochs=3)
    maker = SimpleNamespace(args=args, ranks=SimpleNamespace(gather=lambda value: [value]))
    torch.manual_seed(5)
    order = ExperienceMaker._orders(maker, 6)
    torch.manual_seed(5)
    assert torch.equal(order, torch.stack([torch.randperm(6) for _ in range(3)]))
    assert ranks_of(2, 1).share([0, 1, 2, 3, 4]) == [1, 3]
    assert ranks_of(2, 1).share(torch.arange(8), 2).tolist() == [2, 3, 6, 7]


def test_the_prompts_are_put_in_a_random_order(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=40, num_generations=4, num_ppo_epochs=2)
    maker = SimpleNamespace(args=args, ranks=SimpleNamespace(gather=lambda value: [value]))
    first, second = ExperienceMaker._orders(maker, 40).tolist()
    assert first != second and first != sorted(first)


# Rows of a rollout


def packed(per_prompt=3, n_prompts=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (n_prompts * per_prompt,), generator=generator).tolist()
    prompts = [[7 + j] * (2 + j) for j in range(n_prompts) for _ in range(per_prompt)]
    return pack_sequences(prompts, [[50 + i] * length for i, length in enumerate(lengths)], 0, CPU, per_prompt)


def test_whole_prompts_stay_groups_and_other_rows_are_plain_ones():
    sequences = packed()
    assert sequences.select(torch.tensor([6, 7, 8, 0, 1, 2])).per_prompt == 3
    assert sequences.select(torch.tensor([4])).per_prompt == 1  # taken out alone
    for rows in ([1, 2, 3], [0, 2, 1], [0, 1], [0, 1, 5], [0, 1, 2, 4, 5, 3]):
        assert sequences.select(torch.tensor(rows)).per_prompt == 1
    assert packed(per_prompt=1).select(torch.tensor([2, 0])).per_prompt == 1
    selected = sequences.select(torch.tensor([3, 4, 5]))
    assert selected.input_ids[:, :3].eq(8).all() and selected.input_ids.shape[1] == int(sequences.lengths[3:6].max())


def test_a_saved_rollout_keeps_its_groups(tmp_path):
    sequences = packed()
    names = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    rollout = Rollout(
        sequences.input_ids,
        sequences.prompt_lengths,
        sequences.completion_lengths,
        **{name: torch.zeros(sequences.mask.shape) for name in names},
        order=torch.arange(9)[None],
        per_prompt=3,
    )
    rollout.save(tmp_path / "rollout")
    assert Rollout.load(tmp_path / "rollout", CPU, per_prompt=3).sequences.per_prompt == 3
    micro_batch = rollout.select(torch.arange(3, 6), minibatch_tokens=torch.tensor(1), share=1.0)
    assert micro_batch.sequences.per_prompt == 3


# Parts within a budget of tokens


def tokens_of(chunk, lengths, prompt_lengths, per_prompt, layout):
    """Number of tokens that pass through the model, counted one group after the other."""
    groups = [chunk[start : start + per_prompt] for start in range(0, len(chunk), per_prompt)]
    if layout is Layout.PLAIN:
        return len(chunk) * max(lengths[row] for row in chunk)
    sizes = [prompt_lengths[rows[0]] + sum(lengths[row] - prompt_lengths[row] for row in rows) for rows in groups]
    return sum(sizes) if layout is Layout.SEGMENTS else len(groups) * max(sizes)


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from(list(Layout)),
    per_prompt=st.integers(1, 4),
    n_prompts=st.integers(1, 8),
    max_rows=st.integers(1, 20),
    max_tokens=st.one_of(st.none(), st.integers(1, 120)),
    seed=st.integers(0, 999),
)
def test_parts_keep_prompts_whole_and_fit_the_budget(layout, per_prompt, n_prompts, max_rows, max_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, 12, (n_prompts,), generator=generator).repeat_interleave(per_prompt)
    lengths = (prompt_lengths + torch.randint(1, 9, prompt_lengths.shape, generator=generator)).tolist()
    prompt_lengths = prompt_lengths.tolist()
    sizes = {"per_prompt": per_prompt, "layout": layout}
    limits = {"max_rows": max_rows, "max_tokens": max_tokens}
    chunks = prompt_chunks(lengths, prompt_lengths, **sizes, **limits)
    if per_prompt == 1:
        assert chunks == budget_chunks(lengths, **limits)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        groups = [chunk[start : start + per_prompt] for start in range(0, len(chunk), per_prompt)]
        assert all(rows == list(range(rows[0], rows[0] + per_prompt)) for rows in groups)
        assert all(rows[0] % per_prompt == 0 for rows in groups)
        is_one = len(groups) == 1  # a prompt that exceeds the budget is a part by itself
        assert is_one or len(chunk) <= max_rows
        if max_tokens is not None and per_prompt > 1:
            assert is_one or tokens_of(chunk, lengths, prompt_lengths, **sizes) <= max_tokens


def test_a_shared_prompt_counts_once():
    # Two prompts of 10 tokens with 2 completions of 5: 20 tokens each by segments, 30 in plain rows.
    rows = {"per_prompt": 2, "max_rows": 8}
    lengths, prompt_lengths = [15] * 4, [10] * 4
    assert len(prompt_chunks(lengths, prompt_lengths, layout=Layout.SEGMENTS, max_tokens=40, **rows)) == 1
    assert len(prompt_chunks(lengths, prompt_lengths, layout=Layout.PLAIN, max_tokens=40, **rows)) == 2
    assert len(prompt_chunks(lengths, prompt_lengths, layout=Layout.PLAIN, max_tokens=60, **rows)) == 1
    # Groups of 20 and 12 tokens: by segments nothing is padded, with a mask the shorter one is.
    lengths, prompt_lengths = [15, 15, 6, 11], [10, 10, 5, 5]
    assert len(prompt_chunks(lengths, prompt_lengths, layout=Layout.SEGMENTS, max_tokens=32, **rows)) == 1
    assert len(prompt_chunks(lengths, prompt_lengths, layout=Layout.MASK, max_tokens=32, **rows)) == 2


# Position in the data


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
    n_prompts=st.integers(1, 30),
    epochs=st.floats(0.1, 4),
)
def test_stretches_of_other_numbers_of_completions_join(parts, n_prompts, epochs):
    stretch, rollout, step, used, sampled = Stretch(), 0, 0, 0, 0
    for prompts, generations, n_rollouts in parts:
        sizes = Sizes(prompts * generations, 2, generations)
        assert sizes.prompts == prompts
        for _ in range(n_rollouts):
            assert stretch.position(rollout, sizes.prompts) == used
            assert stretch.completions_before(rollout, sizes.completions) == sampled
            rollout, step = rollout + 1, step + 2
            used, sampled = used + prompts, sampled + prompts * generations
        end = stretch.steps_in_run(epochs, n_prompts, sizes)
        missing = (end - step) / 2 * prompts
        assert end == stretch.step or -1e-6 <= used + missing - epochs * n_prompts < prompts + 1e-6
        stretch = Stretch(rollout, used, step, completions=sampled)


def test_epochs_count_prompts(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "num_ppo_epochs": 1, "num_train_epochs": 3}
    # 8 completions of 2 prompts per rollout and process: 3 passes over 12 prompts are 18 rollouts.
    assert with_max_steps(config(tmp_path, num_generations=4, **sizes), 12, 1).max_steps == 18
    assert with_max_steps(config(tmp_path, num_generations=4, **sizes), 12, 3).max_steps == 6
    assert with_max_steps(config(tmp_path, **sizes), 12, 1).max_steps == 5


def saved_state(folder, args, ranks, **state):
    """Writes a checkpoint's state between two rollouts, and returns it as it is read."""
    PPOState(kl_coef=0.1, step_in_rollout=10**6, **state).save(folder, args, ranks, critic="head")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 6}))
    return json.loads((folder / "ppo_state.json").read_text())


def test_a_checkpoint_goes_on_after_its_prompts_with_another_number_of_completions(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=8, num_generations=4, num_mini_batches=1)
    ranks = ranks_of(1, 0)
    state = saved_state(tmp_path, args, ranks, rollout_index=2)  # 3 rollouts of 2 prompts
    assert state["geometry"]["num_generations"] == 4 and stretch_after(tmp_path, state, sizes_of(args, ranks)).step == 0
    other = sizes_of(config(tmp_path, per_device_train_batch_size=8, num_generations=2), ranks)
    after = stretch_after(tmp_path, state, other)
    assert after == Stretch(rollout=3, prompt=6, step=6, run=0, completions=24)
    line = said_of_other_sizes(Sizes.of(state["geometry"]), other, after.prompt, args, counts_epochs=False)
    assert "8 completions of 4 prompts" in line and "had 8 of 2" in line and "after the first 6" in line


def test_a_checkpoint_of_an_earlier_version_had_one_completion_per_prompt(tmp_path):
    args, ranks = config(tmp_path, per_device_train_batch_size=8, num_mini_batches=1), ranks_of(1, 0)
    state = saved_state(tmp_path, args, ranks, rollout_index=2)
    del state["geometry"]["num_generations"], state["stretch"]["completions"]
    assert stretch_after(tmp_path, state, sizes_of(args, ranks)) == Stretch()
    other = sizes_of(config(tmp_path, per_device_train_batch_size=8, num_generations=4), ranks)
    assert stretch_after(tmp_path, state, other) == Stretch(3, 24, 6, 0, completions=24)


def test_another_number_is_refused_in_the_middle_of_a_rollout(tmp_path):
    args, ranks = config(tmp_path, per_device_train_batch_size=8, num_generations=4), ranks_of(1, 0)
    saved_state(tmp_path, args, ranks)
    (tmp_path / "ppo_rollout.safetensors").touch()  # in use
    other = config(tmp_path, per_device_train_batch_size=8, num_generations=2)
    with pytest.raises(UserError, match="num_generations=4, but it is now 2: set num_generations=4") as error:
        PPOState.load(tmp_path, other, ranks, critic="head")
    assert "\n" not in str(error.value)
    # A checkpoint of an earlier version has no number.
    state = json.loads((tmp_path / "ppo_state.json").read_text())
    del state["geometry"]["num_generations"]
    (tmp_path / "ppo_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="num_generations=1, but it is now 2"):
        PPOState.load(tmp_path, other, ranks, critic="head")
    assert geometry(other, ranks)["num_generations"] == 2


# Engines of the user


class TakesN:
    def generate(self, prompt_ids, sampling, n=1):
        """As in the protocol."""


class TakesAll:
    def generate(self, prompt_ids, sampling, **options):
        """As an engine that hands options on."""


class TakesTwo:
    def generate(self, prompt_ids, sampling):
        """As an engine for one completion."""


class ByPosition:
    def generate(self, prompt_ids, sampling, n=1, /):
        """`n` cannot be given by name."""


@pytest.mark.parametrize(
    "engine, expected", [(TakesN(), True), (TakesAll(), True), (TakesTwo(), False), (ByPosition(), False)]
)
def test_whether_an_engine_takes_n(engine, expected):
    assert takes_n(engine) is expected


def test_the_number_of_completions_is_checked():
    sampling = Sampling(max_new_tokens=4, stop_ids=[2], pad_token_id=0)
    options = {"token_rows": 9, "engine": TakesN()}
    ids = [[5, 2], [3, 2], [4, 2], [6, 2]]
    assert checked_samples(Samples(ids, None), [[7], [8]], sampling, n=2, **options).ids == ids
    with pytest.raises(UserError, match="TakesN.generate returned 4 completions for 2 prompts with n=3: return n"):
        checked_samples(Samples(ids, None), [[7], [8]], sampling, n=3, **options)
