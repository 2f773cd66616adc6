"""Contracts: what we rely on in TRL's internals and in the methods that our trainers override.

When one of these fails after an upgrade, upstream changed something that a trainer here is built on. Each test records
its seam, the name that it watches in another library: `make test-newest` lists those that moved.
"""

import contextlib
import dataclasses
import functools
import inspect
import warnings
from importlib import import_module

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModelForCausalLM, PeftModelForSequenceClassification, get_peft_model

from hf_rlhf_ext import compat

IDS = torch.tensor([[5, 6, 7, 8]])


def seam_of(node):
    """What a test watches in another library, as `module.name`; None for a test of our own lists."""
    values = node.callspec.params if hasattr(node, "callspec") else {}
    for name in (node.originalname.removeprefix("test_contract_of_"), values.get("name")):
        if name in compat._TRL_NAMES:
            return ".".join(compat._TRL_NAMES[name])
    if "method" in values:
        upstream = None
        with contextlib.suppress(ImportError):  # of the trainer: the test itself says so
            upstream = upstream_class(trainer_class(values["trainer"]), values["method"])
        upstream = upstream or transformers.Trainer
        return f"{upstream.__module__}.{upstream.__name__}.{values['method']}"
    mark = node.get_closest_marker("seam")
    return mark and mark.args[0]


@pytest.fixture(autouse=True)
def seam(request, record_property):
    record_property("seam", seam_of(request.node) or "")


def parameters(func):
    return list(inspect.signature(func).parameters)


def defaults(func):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(func).parameters.items()
        if parameter.default is not parameter.empty
    }


# Names


@pytest.mark.parametrize("name", compat._TRL_NAMES)
def test_every_name_resolves_to_what_the_table_says(name):
    module, attribute = compat._TRL_NAMES[name]
    assert getattr(compat, name) is getattr(import_module(module), attribute)


def test_every_name_has_a_contract_here():
    source = inspect.getsource(inspect.getmodule(test_every_name_has_a_contract_here))
    assert [name for name in compat._TRL_NAMES if f"def test_contract_of_{name}(" not in source] == []


OF_OUR_LISTS = {
    "test_every_name_has_a_contract_here",
    "test_every_contract_records_its_seam",
    "test_every_name_is_used",
    "test_an_unknown_name_is_an_attribute_error",
    "test_the_list_names_every_override_and_nothing_else",
    "test_every_trainer_is_in_the_list",
    "test_importing_compat_warns_of_nothing",
}
"""Tests that watch no single name in another library."""


def test_every_contract_records_its_seam(request):
    here = [item for item in request.session.items if item.path == request.path]
    assert {item.originalname for item in here if not seam_of(item)} <= OF_OUR_LISTS


def test_every_name_is_used():
    package = import_module("hf_rlhf_ext").__path__[0]
    from pathlib import Path

    sources = [path.read_text() for path in Path(package).rglob("*.py") if path.name != "compat.py"]
    assert [name for name in compat._TRL_NAMES if not any(name in source for source in sources)] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_rlhf_ext.compat' has no attribute 'nonsense'"):
        compat.nonsense  # noqa: B018


def test_contract_of_BaseTrainer():
    assert compat.BaseTrainer.__bases__ == (transformers.Trainer,)
    own = {name for name in vars(compat.BaseTrainer) if not name.startswith("__")}
    assert own == {
        "loss_is_scaled_for_ga",
        "_tag_names",
        "_name",
        "_paper",
        "_template_file",
        "_send_telemetry",
        "create_model_card",
    }
    assert compat.BaseTrainer.loss_is_scaled_for_ga is None
    assert issubclass(trainer_class("PPOTrainer"), compat.BaseTrainer)


def test_contract_of_BaseConfig(tmp_path):
    assert compat.BaseConfig.__bases__ == (transformers.TrainingArguments,)
    args = compat.BaseConfig(str(tmp_path), use_cpu=True)
    assert (args.bf16, args.gradient_checkpointing, args.logging_steps) == (True, True, 10)
    assert "lr_scheduler_kwargs" in compat.BaseConfig._VALID_DICT_FIELDS  # ours are added to these


def test_contract_of_disable_dropout_in_model(tiny_llama):
    assert parameters(compat.disable_dropout_in_model) == ["model"]
    model = get_peft_model(tiny_llama, LoraConfig(lora_dropout=0.5, target_modules=["q_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    compat.disable_dropout_in_model(model.train())
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert torch.equal(first, second)


def test_contract_of_print_prompt_completions_sample(capsys):
    func = compat.print_prompt_completions_sample
    assert parameters(func)[:6] == ["prompts", "completions", "rewards", "advantages", "step", "num_samples"]
    messages = [{"role": "user", "content": "Say hi"}]
    func(["The sky", messages], [" is blue", "hi"], {"gold": [1.25, -2.5]}, None, 42, 2)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("42", "The sky", "is blue", "Say hi", "gold", "1.25", "-2.50"))


def test_contract_of_get_callable_name():
    def gold():
        pass

    class Scorer:
        def __call__(self):
            pass

    assert [compat.get_callable_name(f) for f in (gold, functools.partial(gold), Scorer())] == [
        "gold",
        "gold",
        "Scorer",
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_contract_of_selective_log_softmax_and_entropy(temperature, with_entropy):
    func = compat.selective_log_softmax_and_entropy
    assert parameters(func)[:4] == ["logits", "index", "entropy_requires_grad", "temperature"]  # passed by position
    logits, index = torch.randn(6, 11, dtype=torch.float64, requires_grad=True), torch.randint(11, (6,))
    logprobs, entropies = func(logits, index, with_entropy, temperature)
    full = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(logprobs, full[range(6), index])
    torch.testing.assert_close(entropies.detach(), -(full.exp() * full).sum(-1).detach())
    assert logprobs.requires_grad and entropies.requires_grad is with_entropy


def test_contract_of_suppress_seqcls_warning(tiny_llama, tmp_path, caplog):
    tiny_llama.save_pretrained(tmp_path)
    with compat.suppress_seqcls_warning():
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert "score.weight" not in caplog.text


def test_contract_of_add_fused_lm_head(tiny_llama):
    assert parameters(compat.add_fused_lm_head) == ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
    expected = tiny_llama(input_ids=IDS).logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    compat.add_fused_lm_head(tiny_llama, outputs=("log_probs", "entropy", "is_top1"))
    outputs = tiny_llama(input_ids=IDS, labels=IDS, use_cache=False, fused_lm_head=True)
    torch.testing.assert_close(outputs.log_probs.reshape(expected.shape), expected)
    assert outputs.log_probs.requires_grad


def test_contract_of_chunked_logprob():
    # The planner replaces these three, and counts what is left.
    tile = ["tile", "tile_stride", "targets"]
    assert parameters(compat.chunked_logprob._forward_tile)[:3] == tile
    assert parameters(compat.chunked_logprob._backward_tile)[:3] == tile
    assert parameters(compat.chunked_logprob._addmm_fp32) == ["acc", "a", "b"]
    assert compat.chunked_logprob.TOKEN_CHUNK_SIZE == 4096


def test_contract_of_trainer_utils():
    assert parameters(compat.trainer_utils._use_triton) == ["device"]
    assert compat.trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32_768


@pytest.mark.parametrize("name", ["other", None])
def test_contract_of_use_adapter(tiny_llama, name):
    assert parameters(compat.use_adapter) == ["model", "adapter_name"]
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama, config).eval()
    model.add_adapter("other", config)
    expected = model(input_ids=IDS).logits
    with pytest.raises(RuntimeError, match="stop"), compat.use_adapter(model, name):
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        raise RuntimeError("stop")
    assert model.active_adapter == "default" and torch.equal(model(input_ids=IDS).logits, expected)


# Overridden methods: name -> the parameters that upstream passes, in this order.

SIGNATURES = {
    "_clip_grad_norm": ["self", "model"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_finish_current_push": ["self"],
    "_get_dataloader": ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
    "_get_eval_sampler": ["self", "eval_dataset"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_maybe_log_save_evaluate": [
        "self",
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_prepare_inputs": ["self", "inputs"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "_set_signature_columns_if_needed": ["self"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "create_optimizer": ["self", "model"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "floating_point_ops": ["self", "inputs"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "get_train_dataloader": ["self"],
    "init_hf_repo": ["self", "token", "private"],
    "log": ["self", "logs", "start_time"],
    "predict": ["self", "test_dataset", "ignore_keys", "metric_key_prefix"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
}
# Imported in a test, and not here: the contracts of names are checked, too, where a trainer cannot be imported.
TRAINERS = {
    "PPOTrainer": "hf_rlhf_ext.ppo.trainer",
    "BradleyTerryTrainer": "hf_rlhf_ext.reward.trainer",
    "PublishingSFTTrainer": "hf_rlhf_ext.hub.sft",
}
OVERRIDDEN = [(trainer, method) for trainer, methods in compat.OVERRIDDEN_METHODS.items() for method in methods]


def trainer_class(name):
    return getattr(import_module(TRAINERS[name]), name)


def upstream_class(trainer, name):
    """The class of TRL or Transformers from which the trainer would inherit the method; None where there is none.

    Where TRL's own passes everything on (`*args, **kwargs`), it is the next one, which names its parameters.
    """
    for cls in trainer.__mro__:
        if cls.__module__.startswith(("trl.", "transformers.")) and name in vars(cls):
            if parameters(vars(cls)[name]) != ["self", "args", "kwargs"]:
                return cls
    return None


def upstream_method(trainer, name):
    cls = upstream_class(trainer, name)
    return None if cls is None else vars(cls)[name]


def overrides(trainer):
    """Methods of TRL's and Transformers' trainers that a class of this library has its own version of."""
    names = set()
    for cls in trainer.__mro__:
        if cls.__module__.startswith("hf_rlhf_ext."):
            names |= {name for name, value in vars(cls).items() if inspect.isfunction(value)}
    return {name for name in names - {"__init__"} if upstream_method(trainer, name) is not None}


@pytest.mark.parametrize("trainer, method", OVERRIDDEN)
def test_an_overridden_method_exists_and_takes_what_ours_takes(trainer, method):
    upstream = upstream_method(trainer_class(trainer), method)
    assert upstream is not None, f"{method} is not there any more"
    assert parameters(upstream) == SIGNATURES[method]
    ours = inspect.signature(getattr(trainer_class(trainer), method))
    arguments = dict.fromkeys(parameters(upstream)[1:])
    required = [key for key in arguments if key not in defaults(upstream)]
    ours.bind(None, *(None for _ in required))  # as upstream calls it, by position
    ours.bind(None, **arguments)  # and by name


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_list_names_every_override_and_nothing_else(trainer):
    assert set(compat.OVERRIDDEN_METHODS[trainer]) == overrides(trainer_class(trainer))


def test_every_trainer_is_in_the_list():
    assert compat.OVERRIDDEN_METHODS.keys() == TRAINERS.keys()
    assert {name for _, name in OVERRIDDEN} == SIGNATURES.keys()


# Behavior of Trainer's own loop that the trainers count on.


@pytest.mark.seam("transformers.trainer.Trainer.training_step")
def test_trainer_scales_no_loss_that_says_it_is_scaled():
    assert "self.loss_is_scaled_for_ga is not None" in inspect.getsource(transformers.Trainer.training_step)


@pytest.mark.seam("transformers.trainer.Trainer._save_checkpoint")
def test_a_checkpoint_is_complete_when_trainer_state_json_is_there():
    source = inspect.getsource(transformers.Trainer._save_checkpoint)
    order = [source.index(text) for text in ("self.save_model(", "self._save_rng_state(", "self.state.save_to_json(")]
    assert order == sorted(order)


@pytest.mark.seam("transformers.trainer.Trainer._inner_training_loop")
def test_an_epoch_that_asks_for_the_end_of_training_is_the_last():
    # `all_steps_are_done` leaves out the epoch of a finished run: no callback could, before the first step is taken.
    source = inspect.getsource(transformers.Trainer._inner_training_loop)
    assert source.index("self._run_epoch(") < source.index("if self.control.should_training_stop:")
    assert "should_training_stop" not in source[: source.index("self._run_epoch(")]


@pytest.mark.seam("transformers.trainer.Trainer._finalize_training")
def test_the_options_that_a_stop_changes_are_those_that_trainer_reads_at_the_end():
    # `StopWithCheckpoint`: with a limit of 1, the end of training deletes all checkpoints but the best one.
    source = inspect.getsource(transformers.Trainer._finalize_training)
    assert "self.args.save_total_limit == 1" in source and "self.args.load_best_model_at_end" in source
    assert source.index("shutil.rmtree") < source.index("callback_handler.on_train_end")


@pytest.mark.seam("transformers.trainer.Trainer._run_epoch")
def test_a_step_is_logged_and_saved_with_the_loss_that_trainer_has_gathered():
    # `PPOTrainer._stop_before_rollout` does it in the place of `Trainer`.
    assert "self._tr_loss = torch.tensor(" in inspect.getsource(transformers.Trainer._inner_training_loop)
    calls = inspect.getsource(transformers.Trainer._run_epoch).split("self._maybe_log_save_evaluate(")[1:]
    assert calls and all(call.lstrip().startswith("self._tr_loss,") for call in calls)
    source = inspect.getsource(transformers.Trainer._maybe_log_save_evaluate)
    # No gradient norm is known then, and nothing is logged or saved twice.
    assert "if grad_norm is not None" in source and "self.state.global_step > self._globalstep_last_logged" in source


@pytest.mark.seam("accelerate.Accelerator.prepare_model")
def test_an_evaluation_marks_the_model_as_prepared():
    # `forget_evaluated_model` takes the mark away, so that training wraps the model.
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare_model(torch.nn.Linear(1, 1), evaluation_mode=True)
    assert model._is_accelerate_prepared
    assert accelerator._models == [model]
    accelerator.free_memory()
    assert accelerator._models == []
    assert "self.model_wrapped = model" in inspect.getsource(transformers.Trainer._prepare_for_training)


@pytest.mark.seam("accelerate.utils.save_fsdp_model")
def test_the_files_of_fsdp_have_the_names_that_trainer_knows():
    # `ppo.sharding` removes the first, and tells by the second which engine a checkpoint is of.
    assert accelerate.utils.constants.FSDP_MODEL_NAME == transformers.trainer.FSDP_MODEL_NAME
    assert f"{accelerate.utils.constants.OPTIMIZER_NAME}.bin" == transformers.trainer.OPTIMIZER_NAME_BIN
    for function, name in (("save_fsdp_model", "FSDP_MODEL_NAME"), ("save_fsdp_optimizer", "OPTIMIZER_NAME")):
        source = inspect.getsource(getattr(accelerate.utils, function))
        assert f'{{{name}}}.bin"' in source and f'f"{{{name}}}_{{' in source
    assert parameters(accelerate.utils.load_fsdp_optimizer)[:5] == [
        "fsdp_plugin",
        "accelerator",
        "optimizer",
        "model",
        "input_dir",
    ]
    saving = inspect.getsource(transformers.Trainer._save_optimizer_and_scheduler)
    assert saving.index("save_fsdp_model(") < saving.index("save_fsdp_optimizer(")


@pytest.mark.seam("accelerate.utils.FullyShardedDataParallelPlugin")
def test_the_settings_of_fsdp_that_trainers_change_or_refuse():
    names = {field.name for field in dataclasses.fields(accelerate.FullyShardedDataParallelPlugin)}
    assert {
        "mixed_precision_policy",
        "ignored_modules",
        "cpu_ram_efficient_loading",
        "activation_checkpointing",
    } <= names
    assert {"cpu_offload", "state_dict_type", "fsdp_version"} <= names


def test_importing_compat_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.require_supported_trl() is None


# What modeling/cache_name.py stands on. When PEFT knows the new name of the cache, that module can go.


@pytest.mark.seam("peft.peft_model.PeftModelForCausalLM.generate")
def test_peft_gives_the_base_its_own_preparation_of_inputs():
    source = inspect.getsource(PeftModelForCausalLM.generate)
    assert "self.base_model.prepare_inputs_for_generation = self.prepare_inputs_for_generation" in source
    source = inspect.getsource(PeftModelForCausalLM.prepare_inputs_for_generation)
    assert "self.base_model_prepare_inputs_for_generation(*args, **kwargs)" in source


@pytest.mark.seam("peft.peft_model.PeftModelForCausalLM.prepare_inputs_for_generation")
def test_peft_knows_the_old_name_of_the_cache_only():
    methods = [PeftModelForCausalLM.prepare_inputs_for_generation, PeftModelForCausalLM.forward]
    methods.append(PeftModelForSequenceClassification._prefix_tuning_forward)
    for method in methods:
        source = inspect.getsource(method)
        assert 'kwargs["past_key_values"]' in source or '"past_key_values" in fwd_params' in source
        assert '"cache"' not in source


@pytest.mark.seam("peft.peft_model.PeftModelForSequenceClassification._prefix_tuning_forward")
def test_peft_looks_for_the_cache_in_the_signature_of_a_classifier():
    source = inspect.getsource(PeftModelForSequenceClassification._prefix_tuning_forward)
    assert "inspect.signature(self.base_model.forward)" in source


@pytest.mark.seam("transformers.training_args.TrainingArguments.__post_init__")
def test_a_renamed_option_that_is_set_warns_of_nothing_and_its_old_name_follows(tmp_path):
    # `compat.resolve_renamed_options` sets the new name first.
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = compat.BaseConfig(str(tmp_path), use_cpu=True, activation_checkpointing=False)
    assert args.activation_checkpointing is args.gradient_checkpointing is False


@pytest.mark.seam("transformers.generation.utils.GenerationMixin._sample")
def test_generation_samples_in_a_method_that_takes_a_full_list_of_processors():
    # ppo.rollout calls it from `custom_generate`, where the list is complete: a recorder must come last.
    assert parameters(transformers.GenerationMixin._sample)[:5] == [
        "self",
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
    ]
    assert "custom_generate" in parameters(transformers.GenerationMixin.generate)
