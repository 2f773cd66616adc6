"""The models that answer, loaded so that adapters of one base share it, as the roles of PPO do."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_rlhf_ext.collect.sampling import PolicySpec
from hf_rlhf_ext.data.prompt_form import MESSAGES, TEXT, PromptForm
from hf_rlhf_ext.data.text import check_tokenizer
from hf_rlhf_ext.modeling.adapter_kinds import base_change, base_sharing_problem
from hf_rlhf_ext.modeling.base_record import BaseRecord
from hf_rlhf_ext.modeling.embeddings import embedding_mismatch, read_embeddings
from hf_rlhf_ext.modeling.loading import base_and_revision, load_policy, load_tokenizer
from hf_rlhf_ext.modeling.quantization import quantization_differs, quantization_record
from hf_rlhf_ext.modeling.stack import AdapterStack
from hf_rlhf_ext.ppo.assembly import config_positions, shared_reward
from hf_rlhf_ext.ppo.engine import stop_token_ids
from hf_rlhf_ext.recipes.chat_parts.options import CastArguments
from hf_rlhf_ext.recipes.chat_parts.plan import Plan
from hf_rlhf_ext.recipes.chat_parts.rewards import RewardSum
from hf_rlhf_ext.reward.ensemble import RewardEnsemble, load_reward
from hf_rlhf_ext.reward.scorer import RewardScorer, dtype_name, local_folder
from hf_rlhf_ext.reward.sharing import same_base

logger = logging.getLogger(__name__)


@dataclass
class Speaker:
    """A model that answers.

    Attributes:
        name: its name beside its answers.
        stack: its base with all adapters on it.
        role: its role in the stack.
        tokenizer: its tokenizer.
        uses_messages: whether questions are rendered by its chat template. Otherwise it continues their text, as it was
            trained on text or has no template.
    """

    name: str
    stack: AdapterStack
    role: str
    tokenizer: PreTrainedTokenizerBase
    uses_messages: bool

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """Inside the context, the model computes with the adapter of this speaker, or without one."""
        with self.stack.activate(self.role) as model:
            yield model

    @property
    def has_adapter(self) -> bool:
        return self.stack.roles[self.role].adapter is not None

    @property
    def device(self) -> torch.device:
        return next(self.stack.model.parameters()).device

    @property
    def positions(self) -> int:
        """Largest number of tokens of a conversation with its answer."""
        return config_positions(self.stack.model)

    @property
    def stop_ids(self) -> list[int]:
        return stop_token_ids(self.tokenizer, self.stack.model)


@dataclass
class Cast:
    """All models that were loaded, and the reward model.

    Attributes:
        speakers: the models that answer.
        scorer: gives rewards to answers: the reward model, or its sum with functions. `None` for no scores.
    """

    speakers: list[Speaker]
    scorer: RewardScorer | RewardEnsemble | RewardSum | None = None

    def note_on_text_models(self, system: str | None) -> str | None:
        """Says which models continue text, and what that means; `None` if there are none."""
        texts = [speaker.name for speaker in self.speakers if not speaker.uses_messages]
        if not texts:
            return None
        lacking = [speaker.name for speaker in self.speakers if speaker.tokenizer.chat_template is None]
        why = "no chat template" if texts == lacking else "trained on plain text"
        without = " and without the system text" if system else ""
        return f"{', '.join(texts)} ({why}): continues the text of each question, without earlier ones{without}"


def load_cast(plan: Plan, args: CastArguments) -> Cast:
    """Loads all models of a plan. Adapters of one base share it, and the base itself answers with its adapters off.

    Raises:
        UserError: a model cannot be loaded, or needs a chat template that it does not have.
    """
    loader = _Loader(args)
    speakers: dict[str, Speaker] = {}
    # Adapters first: a base that is among the models then needs no memory of its own.
    adapters_first = sorted(plan.specs, key=lambda spec: base_and_revision(spec.location, spec.revision)[0] is None)
    for spec in adapters_first:
        speakers[spec.name] = loader.load(spec)
    forms = [PromptForm.load(spec.location, spec.revision).prompt_form for spec in plan.specs]
    for spec, form in zip(plan.specs, forms, strict=True):
        speakers[spec.name].uses_messages = _uses_messages(speakers[spec.name].tokenizer, form, forms)
    scorer = None
    if plan.reward_model is not None:
        scorer = loader.load_scorer(plan.reward_model)
    if plan.functions:
        scorer = RewardSum(scorer, list(plan.functions.values()), plan.weights)
    return Cast([speakers[spec.name] for spec in plan.specs], scorer)


@dataclass
class _Shared:
    """A base that is loaded, with its first adapter.

    Attributes:
        name: name of the base, as the adapter names it.
        revision: its revision.
        first: folder of the first adapter.
        stack: the base with its adapters.
        changed_base: whether the first adapter brought embeddings of its own or changed other weights of the base.
    """

    name: str
    revision: str | None
    first: Path
    stack: AdapterStack
    changed_base: bool


class _Loader:
    """Loads models one by one, on a base that is there already if it is the same."""

    def __init__(self, args: CastArguments):
        self.args = args
        self.shared: list[_Shared] = []

    def load(self, spec: PolicySpec) -> Speaker:
        """Loads one model."""
        base, revision = base_and_revision(spec.location, spec.revision)
        if base is None:
            for shared in self.shared:
                if self._is_base_of(spec, shared):
                    return self._speaker_on(shared.stack, spec, None, _tokenizer_of(spec, self.args))
            return self._load_own(spec)
        folder = _adapter_folder(spec)
        for shared in self.shared:
            if same_base(base, shared.name) and revision == shared.revision and self._fits(folder, shared):
                return self._speaker_on(shared.stack, spec, folder, _tokenizer_of(spec, self.args))
        speaker = self._load_own(spec)
        config = PeftConfig.from_pretrained(str(folder))
        changed = base_change(config) is not None or bool(read_embeddings(folder, _base_of(speaker.stack)).base)
        self.shared.append(_Shared(base, revision, folder, speaker.stack, changed))
        return speaker

    def load_scorer(self, location: str) -> RewardScorer | RewardEnsemble:
        """Loads the reward model, as an adapter on the base of a policy if it was trained on the same one."""
        for shared in self.shared:
            scorer = shared_reward(shared.stack, location)
            if scorer is not None:
                return scorer
        return load_reward(location, trust_remote_code=self.args.trust_remote_code)

    def _is_base_of(self, spec: PolicySpec, shared: _Shared) -> bool:
        """Whether a whole model is the base of adapters that are loaded, which are then switched off for it."""
        return same_base(spec.location, shared.name) and spec.revision == shared.revision and not shared.changed_base

    def _fits(self, folder: Path, shared: _Shared) -> bool:
        """Whether an adapter can be attached beside those of a base that is loaded."""
        config = PeftConfig.from_pretrained(str(folder))
        model = shared.stack.model
        if shared.changed_base or base_change(config) is not None:
            return False
        if config.peft_type != model.active_peft_config.peft_type:  # PEFT holds adapters of one type only
            return False
        if base_sharing_problem(config, model.peft_config.values()) is not None:
            return False
        return embedding_mismatch(folder, model) is None and self._is_as_trained(folder, model)

    def _is_as_trained(self, folder: Path, model: PeftModel) -> bool:
        """Whether a loaded base has the precision that was asked for, or in which an adapter was trained."""
        record = BaseRecord.load(folder)
        if record is None:
            return True
        if self.args.load_in_4bit is None and quantization_differs(record.quantization, quantization_record(model)):
            return False
        # Weights in bf16 or fp16 are exact in fp32.
        return self.args.dtype != "auto" or dtype_name(model) in (record.dtype, "float32")

    def _load_own(self, spec: PolicySpec) -> Speaker:
        """Loads a model with a base of its own."""
        options = {
            "attn_implementation": self.args.attn_implementation,
            "trust_remote_code": self.args.trust_remote_code,
            **_precision(spec, self.args),
        }
        model, tokenizer = load_policy(spec.location, revision=spec.revision, **options)
        if quantization_record(model) is None and torch.cuda.is_available():  # quantized weights are in their place
            model.to("cuda")
        stack = AdapterStack(model.requires_grad_(False).eval())
        return self._speaker(stack, spec, "policy", tokenizer)

    def _speaker_on(
        self, stack: AdapterStack, spec: PolicySpec, folder: Path | None, tokenizer: PreTrainedTokenizerBase
    ) -> Speaker:
        """Adds a role to a base that is loaded: an adapter, or the base without one."""
        role = f"speaker_{len(stack.roles)}"  # a name of a model may have dots, which a module must not
        stack.attach(role, folder)
        stack.model.eval()
        return self._speaker(stack, spec, role, tokenizer)

    def _speaker(self, stack: AdapterStack, spec: PolicySpec, role: str, tokenizer: PreTrainedTokenizerBase) -> Speaker:
        check_tokenizer(tokenizer, needs_chat_template=False)
        return Speaker(spec.name, stack, role, tokenizer, uses_messages=tokenizer.chat_template is not None)


def _uses_messages(tokenizer: PreTrainedTokenizerBase, form: str | None, forms: Sequence[str | None]) -> bool:
    """Whether a model answers messages.

    Args:
        tokenizer: its tokenizer, which needs a chat template for that.
        form: what it was trained on; `None` if it is not known, as of a base.
        forms: what all models were trained on. A base gets the questions in the form of the others.
    """
    if tokenizer.chat_template is None:
        return False
    if form is None and MESSAGES not in forms and TEXT in forms:
        form = TEXT
    return form != TEXT


def _precision(spec: PolicySpec, args: CastArguments) -> dict[str, Any]:
    """The options of `load_base_model` on precision: those of the command line, or else as the adapter was trained."""
    record = None
    if base_and_revision(spec.location, spec.revision)[0] is not None:  # a whole model has no record of its base
        place = Path(spec.location).expanduser() if _is_folder(spec) else spec.location
        record = BaseRecord.load(place, spec.revision)
    options: dict[str, Any] = {"dtype": args.dtype, "load_in_4bit": bool(args.load_in_4bit)}
    if record is None:
        return options
    if args.dtype == "auto":
        options["dtype"] = record.dtype
    if args.load_in_4bit is None and record.quantization is not None:
        options["quantization_config"] = record.quantization
    return options


def _is_folder(spec: PolicySpec) -> bool:
    return Path(spec.location).expanduser().is_dir()


def _adapter_folder(spec: PolicySpec) -> Path:
    """The local folder of an adapter; one on the Hub is downloaded."""
    if _is_folder(spec):
        return Path(spec.location).expanduser()
    return local_folder(spec.location, spec.revision)


def _base_of(stack: AdapterStack) -> nn.Module:
    return stack.model.get_base_model() if isinstance(stack.model, PeftModel) else stack.model


def _tokenizer_of(spec: PolicySpec, args: CastArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that shares its base, which may be that of the base."""
    name, revision = spec.location, spec.revision
    base, base_revision = base_and_revision(name, revision)
    if base is not None and _is_folder(spec) and not (_adapter_folder(spec) / "tokenizer_config.json").is_file():
        name, revision = base, base_revision
    return load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
