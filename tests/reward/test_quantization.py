"""A reward model is reloaded on a base that is quantized exactly as in training, whatever the quantization."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.heads import ScalarHead
from hf_rlhf_ext.modeling.loading import four_bit_config, load_base_model
from hf_rlhf_ext.modeling.quantization import (
    as_record,
    describe_quantization,
    prepare_quantized,
    quantization_differs,
    quantization_record,
)
from hf_rlhf_ext.ppo.assembly import prepare_inputs
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.ensemble import RewardEnsemble
from hf_rlhf_ext.reward.export import export_merged
from hf_rlhf_ext.reward.model_setup import resolve_model
from hf_rlhf_ext.reward.normalization import NORMALIZATION_FILE, RewardNormalization
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.sharing import shareable_adapter
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.reward.examples import comparisons

bitsandbytes = pytest.importorskip("bitsandbytes")

TEXTS = (["Tell me:", "Tell a story:", "Tell:"], ["a sunny day", "happy", "lazy dog"])
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
KINDS = {
    "nf4-double": FOUR_BITS | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": FOUR_BITS | {"bnb_4bit_quant_type": "nf4"},
    "nf4-fp32": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True},
    "fp4-skip": {"load_in_4bit": True, "llm_int8_skip_modules": ["v_proj"]},  # so the head is quantized
    "fp4-storage": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "int8-skip": {"load_in_8bit": True, "llm_int8_threshold": 0.5, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
}


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_factory):
    return chat_tokenizer_factory()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A language model with blocks of 64 weights, in fp32."""
    folder = tmp_path_factory.mktemp("quantization") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(base, tokenizer, tmp_path_factory):
    """Trains one step and saves; returns the trainer."""

    def run(model, **options):
        init = options.pop("model_init_kwargs", None)
        folder = str(tmp_path_factory.mktemp("trained"))
        args = BradleyTerryConfig(
            folder, use_cpu=True, bf16=False, report_to="none", max_steps=1, learning_rate=1e-2, model_init_kwargs=init
        )
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
        trainer = BradleyTerryTrainer(
            model, args, comparisons(3), processing_class=tokenizer, peft_config=lora, **options
        )
        trainer.train()
        trainer.save_model()
        return trainer

    return run


def users_own(base, kind) -> LlamaForSequenceClassification:
    """A base that the user quantized without this library."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32
    )
    model.config.name_or_path = str(base)
    return model


@pytest.fixture(scope="module")
def trained(base, train):
    """Trainers on a base of the user's for each kind; each is trained once."""
    trainers = {}

    def get(kind):
        if kind not in trainers:
            trainers[kind] = train(users_own(base, kind))
        return trainers[kind]

    return get


def live_scores(trainer):
    scale = {"mean": trainer.normalization.mean, "std": trainer.normalization.std}
    return RewardScorer(trainer.model, trainer.processing_class, **scale)(*TEXTS)


def quantized_weights(model):
    """The packed weights of all quantized layers of the backbone."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt) and ".layers." in name:
            weights[name] = module.weight.data.view(torch.uint8)
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_quantizes_the_base_as_in_training(kind, trained, caplog):
    trainer = trained(kind)
    recorded = RewardNormalization.load(trainer.args.output_dir)
    for option, value in KINDS[kind].items():
        assert recorded.quantization[option] == value
    scorer = RewardScorer.from_pretrained(trainer.args.output_dir)
    assert scorer(*TEXTS) == pytest.approx(live_scores(trainer), abs=1e-6)
    before, after = quantized_weights(trainer.model), quantized_weights(scorer.model)
    assert before and before.keys() == after.keys()
    assert all(torch.equal(weights, after[name]) for name, weights in before.items())
    assert "scores differ" not in caplog.text


@pytest.mark.parametrize("kind", ["fp4-skip", "int8-skip"])
def test_a_head_that_was_quantized_is_trained_in_fp32_from_its_value(kind, base, tokenizer, tmp_path):
    LlamaForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = users_own(tmp_path, kind)
    quantized = model.score
    assert isinstance(quantized, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
    hidden = torch.randn(4, quantized.in_features)
    quantized.support_avx512bf16_for_cpu = False  # on a CPU with AVX512-BF16, this path fails for a single output
    expected = quantized(hidden)
    model, _ = resolve_model(model, None, {})
    assert isinstance(model.score, ScalarHead) and model.score.weight.shape == (1, quantized.in_features)
    assert torch.allclose(model.score(hidden), expected, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "kind, way", [("nf4", "quantization_config"), ("int8", "model_init_kwargs"), ("nf4", "values")]
)
def test_a_model_given_by_name_is_quantized_by_the_option(kind, way, base, train, caplog):
    config = BitsAndBytesConfig(**KINDS[kind])
    if way == "quantization_config":
        trainer = train(str(base), quantization_config=config)
    elif way == "model_init_kwargs":
        trainer = train(str(base), model_init_kwargs={"quantization_config": config, "dtype": "float32"})
    else:  # as a YAML file has it
        trainer = train(str(base), model_init_kwargs={"quantization_config": dict(KINDS[kind]), "dtype": "float32"})
    assert not quantization_differs(trainer.normalization.quantization, as_record(config))
    again = RewardScorer.from_pretrained(trainer.args.output_dir)(*TEXTS)
    assert again == pytest.approx(live_scores(trainer), abs=1e-6)
    assert "will be ignored" not in caplog.text


def test_the_librarys_own_4_bits_are_recorded_as_before_and_in_full(base, train):
    trainer = train(load_base_model(str(base), task="reward", dtype="float32", load_in_4bit=True))
    content = json.loads((Path(trainer.args.output_dir) / NORMALIZATION_FILE).read_text())
    assert content["load_in_4bit"] is True
    assert not quantization_differs(content["quantization"], as_record(four_bit_config()))


def test_a_folder_of_an_earlier_version_is_loaded_in_nf4(base, train, caplog):
    trainer = train(load_base_model(str(base), task="reward", dtype="float32", load_in_4bit=True))
    file = Path(trainer.args.output_dir) / NORMALIZATION_FILE
    content = json.loads(file.read_text())
    del content["quantization"]
    file.write_text(json.dumps(content))
    scorer = RewardScorer.from_pretrained(trainer.args.output_dir)
    assert scorer(*TEXTS) == pytest.approx(live_scores(trainer), abs=1e-6)
    policy = load_base_model(str(base), dtype="float32", load_in_4bit=True)
    policy = get_peft_model(policy, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert shareable_adapter(Path(trainer.args.output_dir), policy) is not None
    assert "scores differ" not in caplog.text


@pytest.mark.parametrize("other", ["nf4", "fp4", "int8", None])
def test_a_reward_adapter_shares_only_a_base_that_is_quantized_alike(other, trained, base, caplog):
    options = {} if other is None else {"quantization_config": KINDS[other]}
    policy = load_base_model(str(base), dtype="float32", **options)
    policy = get_peft_model(policy, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for kind in ("nf4", "fp4", "int8"):
        caplog.clear()
        shared = shareable_adapter(Path(trained(kind).args.output_dir), policy)
        assert (shared is not None) == (kind == other)
        assert ("separate base" in caplog.text) == (kind != other)
    if other == "nf4":
        shareable_adapter(Path(trained("fp4").args.output_dir), policy, name="my/reward")
        assert "FP4 (computed in float32) weights, but the policy has 4-bit NF4 (computed in bfloat16)" in caplog.text


def test_members_of_an_ensemble_share_a_base_only_if_it_is_quantized_alike(trained, caplog):
    folders = [trained(kind).args.output_dir for kind in ("fp4", "fp4-storage", "nf4")]
    ensemble = RewardEnsemble.from_pretrained(folders)
    first, same, other = ensemble.members
    assert same.model is first.model and other.model is not first.model
    assert "NF4" in caplog.text and "separate base" in caplog.text
    for member, kind in ((first, "fp4"), (other, "nf4")):
        assert member(*TEXTS) == pytest.approx(live_scores(trained(kind)), abs=1e-6)


@pytest.mark.parametrize("kind, given", [("fp4", "nf4"), ("int8", "fp4"), ("nf4-fp32", "nf4"), ("int8", "int8-skip")])
def test_a_given_base_that_is_quantized_otherwise_is_said(kind, given, trained, base, caplog):
    RewardScorer.from_pretrained(trained(kind).args.output_dir, base=users_own(base, given))
    assert "scores differ. Leave `base` out" in caplog.text
    caplog.clear()
    scorer = RewardScorer.from_pretrained(trained(kind).args.output_dir, base=users_own(base, kind))
    assert "scores differ" not in caplog.text
    assert scorer(*TEXTS) == pytest.approx(live_scores(trained(kind)), abs=1e-6)


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(kind, base, train, tokenizer, tmp_path, caplog):
    config = BitsAndBytesConfig(**KINDS[kind])
    quantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    quantized.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    trainer = train(load_base_model(str(tmp_path / "quantized"), task="reward", dtype="float32"))
    again = RewardScorer.from_pretrained(trainer.args.output_dir)
    assert again(*TEXTS) == pytest.approx(live_scores(trainer), abs=1e-6)
    assert "quantized already" not in caplog.text and "scores differ" not in caplog.text

    with pytest.raises(UserError, match="^export_merged: .*quantized.*base="):
        export_merged(trainer.args.output_dir, tmp_path / "merged")
    model = load_base_model(str(tmp_path / "quantized"), dtype="float32", load_in_4bit=True)
    assert not quantization_differs(quantization_record(model), as_record(config))
    assert "is quantized already" in caplog.text and "instead of 4-bit NF4" in caplog.text

    # The base of an adapter is quantized otherwise than when it was trained.
    file = Path(trainer.args.output_dir) / NORMALIZATION_FILE
    content = json.loads(file.read_text())
    content["quantization"] |= as_record(BitsAndBytesConfig(**KINDS["nf4"]))
    content["load_in_4bit"] = True
    file.write_text(json.dumps(content))
    RewardScorer.from_pretrained(trainer.args.output_dir)
    assert "scores differ. The checkpoint of the base is quantized itself" in caplog.text


@pytest.mark.parametrize(
    "options, named",
    [
        ({"load_in_4bit": True, "quantization_config": {"load_in_8bit": True}}, "leave load_in_4bit out"),
        ({"quantization_config": {}}, "quantization_config: "),
        ({"quantization_config": "int8"}, "BitsAndBytesConfig"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "only one can be used"),
        ({"quantization_config": {"quant_method": "unheard-of"}}, "unheard-of"),
        ({"quantization_config": BitsAndBytesConfig()}, "load_in_8bit=True"),
        ({"quantization_config": FOUR_BITS | {"bnb_4bit_quant_type": "nf5"}}, "'nf4' or 'fp4'"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": 16}}, "bnb_4bit_compute_dtype"),
    ],
)
def test_an_unusable_quantization_is_one_line(options, named, base):
    with pytest.raises(UserError) as error:
        load_base_model(str(base), **options)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_quantization_is_given_once(base, train):
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(UserError, match="^quantization_config .*model_init_kwargs"):
        train(str(base), quantization_config=config, model_init_kwargs={"quantization_config": config})


@pytest.mark.parametrize("given_as", ["name", "model"])
def test_a_quantized_encoder_is_refused(given_as, train, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(tokenizer), num_labels=1)).save_pretrained(
        tmp_path
    )
    config = BitsAndBytesConfig(load_in_8bit=True)
    if given_as == "name":
        with pytest.raises(UserError, match="^quantization_config .*encoder.*fp32"):
            load_base_model(str(tmp_path), task="reward", quantization_config=config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
        with pytest.raises(UserError, match="^model: .*encoder.*fp32"):
            train(model)


# The gradients of 4-bit weights on a CPU


def may_repack(model):
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    return {layer.support_avx512bf16_for_cpu for layer in layers}


def test_4_bit_weights_of_the_users_own_are_never_repacked(base, train):
    model = users_own(base, "nf4")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as on a CPU with these instructions
    prepare_quantized(model)
    assert may_repack(model) == {False}


@pytest.mark.parametrize("trainer", ["reward", "ppo"])
def test_4_bit_weights_that_are_repacked_already_are_refused(trainer, base, train, tokenizer):
    if trainer == "reward":
        model = users_own(base, "nf4")
    else:
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**KINDS["nf4"]))
    layer = next(module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
    repack = bitsandbytes.functional._convert_weight_packed_for_cpu  # what a forward pass calls on such a CPU
    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    with pytest.raises(UserError, match="^model: .*repacked.*load the model again"):
        if trainer == "reward":
            train(model)
        else:
            prompts = Dataset.from_list([{"prompt": "Tell me:"}])
            args = PPOConfig("unused", use_cpu=True, bf16=False, report_to="none")
            lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
            others = {"eval_dataset": None, "ptx_dataset": None, "peft_config": lora}
            prepare_inputs(model, args, train_dataset=prompts, tokenizer=tokenizer, **others)


# Descriptions


@pytest.mark.parametrize(
    "change, differs",
    [
        ({}, False),
        ({"bnb_4bit_quant_type": "fp4"}, True),
        ({"bnb_4bit_use_double_quant": True}, True),
        ({"bnb_4bit_compute_dtype": "float16"}, True),
        ({"llm_int8_skip_modules": ["o_proj"]}, True),
        ({"llm_int8_skip_modules": ["lm_head", "score"]}, False),  # heads
        ({"bnb_4bit_quant_storage": "float32"}, False),  # how the same bits are stored
        ({"llm_int8_threshold": 1.0}, False),  # of 8 bits only
    ],
)
def test_what_decides_the_outputs_of_4_bits(change, differs):
    first = as_record(BitsAndBytesConfig(**KINDS["nf4"]))
    second = as_record(BitsAndBytesConfig(**(KINDS["nf4"] | change)))
    assert quantization_differs(first, second) is differs
    if differs:
        assert describe_quantization(first) != describe_quantization(second)


def test_a_record_of_another_method_is_compared_as_a_whole():
    first = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert not quantization_differs(first, dict(first))
    assert quantization_differs(first, first | {"group_size": 64})
    assert quantization_differs(first, None) and describe_quantization(first) == "gptq"
    assert not quantization_differs(None, None)


def test_the_record_of_an_unquantized_base_stays_as_it_was(base, train):
    trainer = train(load_base_model(str(base), task="reward", dtype="float32"))
    assert "quantization" not in json.loads((Path(trainer.args.output_dir) / NORMALIZATION_FILE).read_text())
