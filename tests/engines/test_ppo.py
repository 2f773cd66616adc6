"""PPO in shards (FSDP2) trains the same weights as with whole weights in each process (DDP).

One launch of two CPU processes for each engine runs all cases, see `ppo_run.py`.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext import PPOConfig
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_base_model, load_policy
from hf_rlhf_ext.ppo.sharding import Sharded, Whole, check_base, check_same_sharding
from hf_rlhf_ext.reward.normalization import RewardNormalization
from hf_rlhf_ext.training.engines import refuse_loading_in_one_process
from tests.engines.launch import launch_cases
from tests.engines.ppo_run import build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

SCRIPT = Path(__file__).with_name("ppo_run.py")
# The second process has fewer prompts, or none. Both engines sample with the same random numbers.
EVALUATED = {"per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 2}
BUDGET = {"max_tokens_per_batch": 20, "generation_batch_size": 1, "merge_for_generation": False}
SAVED = {"critic": "adapter", "max_steps": 8, "save_strategy": "steps", "save_steps": 6}
ROLLED_BACK = {"critic": "adapter", "max_steps": 10, "save_strategy": "steps", "save_steps": 4, "vf_coef": 0.05}
ROLLED_BACK |= {"max_kl": 0.1, "max_kl_action": "rollback"}
SHARED = {"num_generations": 2, "per_device_train_batch_size": 4}
# The second rollout needs a last block of reference answers, for which the other process joins in.
SHAPED = SHARED | {"critic": "adapter", "num_ppo_epochs": 1, "max_steps": 4, "max_tokens_per_batch": 40}
SHAPED |= {"reward_shaping": "par", "num_reference_answers": 3, "mask_truncated_completions": True}
CASES = [
    {
        "name": "head",
        "model": "tied",
        "ptx": True,
        "options": {"critic": "head", "ptx_coef": 0.5, "ptx_batch_size": 4, "exact_kl_rows": 2} | EVALUATED | BUDGET,
    },
    {
        "name": "adapter",
        "reward_models": ["reward"],
        "eval_rows": 1,
        "evaluates_first": True,
        "lora": {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]},
        "options": {"critic": "adapter", "activation_checkpointing": True, "max_steps": 2} | EVALUATED,
    },
    {"name": "whole", "policy": "sft", "saves": True, "options": SAVED},
    {"name": "resumed", "policy": "sft", "resumes": "whole/checkpoint-6", "options": SAVED},
    {"name": "rollback", "policy": "sft", "jumps": [6, 20.0], "options": ROLLED_BACK},
    {"name": "no critic", "options": SHARED | {"critic": "none", "max_steps": 2} | EVALUATED | BUDGET},
    {"name": "shaped", "policy": "sft", "reward_models": ["reward"], "options": SHAPED | {"generation_batch_size": 4}},
    {
        "name": "shared prompts",
        "reward_models": ["reward"],
        "options": SHARED | {"critic": "adapter", "save_strategy": "steps", "save_steps": 2, "joint_scoring": True},
    },
    {
        "name": "shared prompts, resumed",
        "reward_models": ["reward"],
        "resumes": "shared prompts/checkpoint-2",  # in the middle of a rollout
        "options": SHARED | {"critic": "adapter", "save_strategy": "steps", "save_steps": 2, "joint_scoring": True},
    },
]


@pytest.fixture(scope="module")
def models(chat_tokenizer_factory, tmp_path_factory):
    """A folder with a model, the same with tied embeddings, an adapter of a policy, and one of a reward model."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = chat_tokenizer_factory()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    for name, tied in (("model", False), ("tied", True)):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=tied, **sizes, **ids)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, task in (("sft", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        torch.manual_seed(5)
        base = load_base_model(folder / "model", task="reward" if name == "reward" else "causal_lm", dtype="float32")
        model = get_peft_model(base, LoraConfig(r=4, task_type=task, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    RewardNormalization(base_dtype="float32").save(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """The folders of all cases, by engine."""

    def run(engine: str) -> Path:
        return launch_cases(engine, SCRIPT, tmp_path_factory.mktemp(engine), models, CASES)

    with ThreadPoolExecutor() as pool:
        return dict(zip(("ddp", "fsdp2"), pool.map(run, ("ddp", "fsdp2")), strict=True))


def numbers(log: dict) -> dict[str, float]:
    """The metrics of a log, without those of time."""
    times = ("runtime", "per_second")
    return {name: value for name, value in log.items() if isinstance(value, float) and not name.endswith(times)}


@pytest.mark.parametrize("case", [case["name"] for case in CASES])
def test_shards_train_the_weights_of_whole_models(folders, case):
    whole, sharded = folders["ddp"] / case, folders["fsdp2"] / case
    expected = load_file(whole / "weights-0.safetensors")
    assert sum(name.startswith("optimizer/") for name in expected) > 10
    for rank in (0, 1):
        found = load_file(sharded / f"weights-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    logs = [json.loads((folder / "log-0.json").read_text()) for folder in (whole, sharded)]
    assert len(logs[0]) == len(logs[1])
    for wanted, found in zip(*logs, strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-6, abs=1e-6, nan_ok=True)
    evaluations = [json.loads((folder / "evaluation-0.json").read_text()) for folder in (whole, sharded)]
    assert numbers(evaluations[1]) == pytest.approx(numbers(evaluations[0]), abs=1e-6)


def test_the_processes_differ_in_what_they_sample(folders):
    """Otherwise the cases above would not show that processes with fewer steps and parts join the others."""
    (rollout, *_) = json.loads((folders["fsdp2"] / "head" / "log-0.json").read_text())
    assert 1 < rollout["completions/mean_length"] < 12 and rollout["completions/stopped_frac"] > 0
    logs = [json.loads((folders["fsdp2"] / "head" / f"log-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(logs[0]) == len(logs[1])


@pytest.mark.parametrize("straight, resumed", [("whole", "resumed"), ("shared prompts", "shared prompts, resumed")])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_resumed_run_is_the_same_to_the_bit(folders, engine, straight, resumed):
    expected = load_file(folders[engine] / straight / "weights-0.safetensors")
    found = load_file(folders[engine] / resumed / "weights-0.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_rollback_restores_shards(folders):
    assert "went back to checkpoint-4 (rollback 1 of 3)" in (folders["fsdp2"] / "stderr.txt").read_text()


def test_saved_files_are_whole_and_load_in_one_process(folders):
    folder = folders["fsdp2"] / "whole"
    trained = load_file(folder / "weights-0.safetensors")
    for place in (folder, folder / "checkpoint-8"):
        names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.safetensors"))
        assert {"adapter_model.safetensors", "value/adapter_model.safetensors"} <= set(names)
        for name in ("adapter_model.safetensors", "value/adapter_model.safetensors", "value/value_head.safetensors"):
            expected = load_file(folders["ddp"] / "whole" / place.relative_to(folder) / name)
            found = load_file(place / name)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=f"{name} {key}")
    # No weights in a pickle.
    assert [path.name for path in (folder / "checkpoint-8").glob("*.bin")] == ["optimizer.bin"]
    policy, _ = load_policy(str(folder / "checkpoint-8"), dtype="float32")
    loaded = {name: value for name, value in policy.named_parameters() if "lora" in name}
    assert loaded and all(torch.equal(value, trained[name]) for name, value in loaded.items())


def test_a_checkpoint_is_for_its_engine(folders):
    checkpoint = folders["fsdp2"] / "whole" / "checkpoint-6"
    trainer = build(folders["fsdp2"], CASES[2] | {"name": "one process"})
    with pytest.raises(UserError, match="optimizer state of a run with fsdp2.*--accelerate_config fsdp2"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(UserError, match="optimizer state of a run with ddp.*--accelerate_config ddp"):
        check_same_sharding(folders["ddp"] / "whole" / "checkpoint-6", is_sharded=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cpu_offload": True}, "fsdp_offload_params: set it to false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: set it to false, and activation_check"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: set it to false"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: set it to FULL_STATE_DICT"),
        ({"mixed_precision": "fp16"}, "fp16: use bf16"),
    ],
)
def test_settings_that_do_not_work_are_refused(monkeypatch, settings, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    precision = settings.pop("mixed_precision", "no")
    options = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False} | settings
    plugin = FullyShardedDataParallelPlugin(**options)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision)
    with pytest.raises(UserError, match=message):
        Sharded(accelerator, ranks=None, model=torch.nn.Linear(2, 2), heads=[])


def test_what_each_process_would_not_have_is_refused_before_models_are_loaded(monkeypatch, tmp_path):
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    base = torch.nn.Linear(2, 2)
    base.is_quantized = True
    refuse_loading_in_one_process(args)
    check_base(args, base)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="fsdp2: .*quantized base: load the base in bf16, .*--accelerate_config ddp"):
        check_base(args, base)
    refuse_loading_in_one_process(args)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match="fsdp_cpu_ram_efficient_loading: .*set it to false"):
        refuse_loading_in_one_process(args)


def test_an_engine_of_the_user_is_refused():
    class Other:
        def sync(self, policy):
            pass

        def generate(self, prompt_ids, sampling, n=1):
            raise AssertionError

    with pytest.raises(UserError, match="engine: Other gets the policy in shards.*leave engine out"):
        Sharded.join_engine(None, Other())


def test_processes_that_lack_passes_repeat_their_last_one():
    sharding = Whole()
    assert sharding.in_step([1, 2]) == [(1, True), (2, True)]
    sharding.most = lambda number: 4
    assert sharding.in_step([1, 2]) == [(1, True), (2, True), (2, False), (2, False)]
