"""`hf-rlhf chat`: models of a run side by side, streamed, with rewards, in a process, a pipe and a terminal."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_rlhf_ext import RewardScorer, load_policy
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.positionals import split_positionals
from hf_rlhf_ext.cli.run_folder import find_models, is_run_folder, system_of_data
from hf_rlhf_ext.data.prompt_form import PromptForm
from hf_rlhf_ext.data.text import decode_completion, encode_generation_prompt
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, stop_token_ids
from hf_rlhf_ext.recipes import chat
from hf_rlhf_ext.recipes.chat_parts.models import load_cast
from hf_rlhf_ext.recipes.chat_parts.options import AnswerArguments, CastArguments
from hf_rlhf_ext.recipes.chat_parts.plan import make_plan
from hf_rlhf_ext.recipes.chat_parts.rewards import RewardSum
from hf_rlhf_ext.recipes.chat_parts.session import Session
from hf_rlhf_ext.recipes.chat_parts.views import PlainView, printable
from tests.recipes.chat_models import save_adapter, save_run

pytestmark = pytest.mark.xdist_group("processes")

QUESTION = [{"role": "user", "content": "Tell me about a sunny day."}]


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_base, chat_tokenizer_factory) -> Path:
    """The folder of a run, beside the folder `base`."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer_factory()
    base = save_base(folder / "base", tokenizer)
    return save_run(base, folder / "run", tokenizer)


@pytest.fixture(scope="module")
def cast(run):
    args = CastArguments(model=[str(run)], dtype="float32")  # on CPUs with bf16 instructions, too
    return load_cast(make_plan(args), args)


class Recorded:
    """A view that keeps what it is shown."""

    def __init__(self, at_piece=lambda text: None):
        self.pieces: dict[str, list[str]] = {}
        self.ended: dict[str, tuple] = {}
        self.notes: list[str] = []
        self.at_piece = at_piece
        self._name = ""

    def begin(self, name):
        self._name = name
        self.pieces[name] = []

    def piece(self, text):
        self.pieces[self._name].append(text)
        self.at_piece(text)

    def end(self, name, text, reward, remark):
        self.ended[name] = (text, reward, remark)

    def note(self, text):
        self.notes.append(text)


def session_of(cast, view=None, **options) -> Session:
    return Session(cast, AnswerArguments(**{"max_new_tokens": 12} | options), view or Recorded())


# What computes an answer


def test_the_models_of_a_run_share_one_base_and_compute_what_they_are(cast, run):
    assert [speaker.name for speaker in cast.speakers] == ["base", "sft", "policy"]
    assert (
        len({id(speaker.stack) for speaker in cast.speakers}) == 1 and cast.scorer.model is cast.speakers[0].stack.model
    )
    ids = torch.arange(3, 12)[None]
    expected = {
        "base": AutoModelForCausalLM.from_pretrained(run.parent / "base"),
        "sft": load_policy(run / "sft", dtype="float32")[0],
        "policy": load_policy(run / "policy", dtype="float32")[0],
    }
    seen = []
    for speaker in cast.speakers:
        with speaker.activated() as model, torch.no_grad():
            logits = model(ids).logits
        torch.testing.assert_close(logits, expected[speaker.name].eval()(ids).logits.detach(), atol=1e-5, rtol=1e-5)
        assert all((logits - other).abs().max() > 1e-2 for other in seen)
        seen.append(logits)


def test_streamed_answers_are_those_of_the_engine_and_are_scored_as_by_the_scorer(cast, run):
    view = Recorded()
    session_of(cast, view, seed=5).take(QUESTION[0]["content"])
    for name, folder in {"base": run.parent / "base", "policy": run / "policy"}.items():
        model, tokenizer = load_policy(folder, dtype="float32")
        engine = TransformersEngine(merge=False)
        engine.sync(model)
        stops = {"stop_ids": stop_token_ids(tokenizer, model), "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(5)
        prompt_ids = encode_generation_prompt(tokenizer, QUESTION)
        (ids,) = engine.generate([prompt_ids], Sampling(max_new_tokens=12, temperature=0.8, **stops)).ids
        text, reward, _ = view.ended[name]
        assert text == decode_completion(tokenizer, ids, prompt_ids) == "".join(view.pieces[name])
        assert len(view.pieces[name]) > 3  # it grew
        scorer = RewardScorer.from_pretrained(run / "reward_model", dtype="float32")
        answer = [{"role": "assistant", "content": text}]
        assert reward == pytest.approx(scorer([QUESTION], [answer])[0], abs=1e-4)


def test_each_model_remembers_its_own_answers_until_a_new_conversation(cast):
    session = session_of(cast, seed=1)
    first = {}
    for question in ("One?", "Two?"):
        session.take(question)
        first.setdefault("text", session.view.ended["policy"][0])
    history = session.histories["policy"]
    assert [message["role"] for message in history] == ["user", "assistant", "user", "assistant"]
    assert history[1]["content"] == first["text"] and session.histories["base"][1]["content"] != ""
    session.take("/new")
    session.take("/seed 1")
    session.take("One?")
    assert session.view.ended["policy"][0] == first["text"] and len(session.histories["policy"]) == 2


def test_the_commands(cast):
    session = session_of(cast)
    notes = session.view.notes
    for line in ("/temperature 0", "/max 3", "/system Be brief.", "/help", ""):
        assert session.take(line)
    assert session.options.is_greedy and session.options.max_new_tokens == 3 and session.system == "Be brief."
    session.take("One?")
    assert session.histories["sft"][0] == {"role": "system", "content": "Be brief."}
    assert session.view.ended["sft"][2] == "cut at 3 tokens"
    before = len(notes)
    for line in ("/temperature warm", "/temperature -1", "/max 0", "/seed x", f"/seed {2**64}", "/ne"):
        assert session.take(line)
    wrong = notes[before:]
    assert len(wrong) == 6 and all("\n" not in note for note in wrong) and "did you mean `/new`" in wrong[-1]
    assert session.options.max_new_tokens == 3
    assert not session.take("/quit")


def test_ctrl_c_stops_one_answer_and_leaves_the_models_as_they_were(cast):
    view = Recorded()
    session = session_of(cast, view, temperature=0, max_new_tokens=20)
    session.take("One?")
    whole = dict(view.ended)

    def interrupt(text):
        if view._name == "policy" and len(view.pieces["policy"]) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    view.at_piece = interrupt
    session.can_be_stopped = True
    handler = signal.getsignal(signal.SIGINT)
    session.take("/new")
    session.take("One?")
    assert signal.getsignal(signal.SIGINT) is handler
    text, reward, remark = view.ended["policy"]
    assert (reward, remark) == (None, "stopped") and whole["policy"][0].startswith(text) and len(text) < 30
    assert view.ended["base"] == whole["base"] and session.histories["policy"][-1]["content"] == text
    view.at_piece = lambda text: None
    session.take("/new")
    session.take("One?")
    assert view.ended == whole


def test_a_text_model_continues_each_question_and_says_so_once(run, tmp_path, capsys):
    shutil.copytree(run / "policy", tmp_path / "texts")
    PromptForm("text").save(tmp_path / "texts")
    args = CastArguments(model=[str(run.parent / "base"), str(tmp_path / "texts")])
    cast = load_cast(make_plan(args), args)
    session = Session(cast, AnswerArguments(max_new_tokens=4), PlainView())
    session.greet()
    session.take("One?")
    assert not session.histories
    done = capsys.readouterr()
    assert done.err.count("continues the text") == 1 and "base, texts (trained on plain text)" in done.err
    assert [line.split(" (")[0] for line in done.out.splitlines() if not line.startswith(" ")] == ["base", "texts"]


def test_a_conversation_that_fills_the_model_is_one_line(cast):
    session = session_of(cast)
    session.take("day " * 600)
    assert len(session.view.notes) == 3 and all("/new" in note for note in session.view.notes)


# What is shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("bell\x07 \x9b cr\r", "bell\\x07 \\x9b cr\\x0d"),
        ("rtl \u202e end", "rtl \\u202e end"),
        ("half \ud83d pair", "half \ufffd pair"),
        ("lines\nand\ttabs, ü and 日本 stay", "lines\nand\ttabs, ü and 日本 stay"),
    ],
)
def test_a_model_cannot_control_the_terminal(text, shown):
    assert printable(text) == shown
    shown.encode()


# Which models


def test_a_run_folder_is_told_from_a_model_and_its_parts_are_found(run, tmp_path):
    assert is_run_folder(run) and not is_run_folder(run / "policy") and not is_run_folder(run.parent / "base")
    found = find_models(run)
    assert (found.base, found.sft) == (str(run.parent / "base"), str(run / "sft"))
    (tmp_path / "mine" / "policy").mkdir(parents=True)  # PPO has not saved yet
    (tmp_path / "mine" / "pipeline.yaml").write_text(
        f"sft_policy: {run / 'sft'}\nreward_model: [{run / 'reward_model'}]\n"
    )
    (tmp_path / "mine" / "manifest.json").write_text('{"settings": {}, "stages": {}}')
    found = find_models(tmp_path / "mine")
    assert (found.sft, found.policy, found.reward_model) == (str(run / "sft"), None, str(run / "reward_model"))
    assert "policy" in found.left_out


def pipeline_in(folder: Path, given: dict, settings: dict) -> Path:
    """The folder of a pipeline that has trained nothing itself yet."""
    folder.mkdir()
    (folder / "pipeline.yaml").write_text(json.dumps(given))
    (folder / "manifest.json").write_text(json.dumps({"settings": settings, "stages": {}}))
    return folder


def test_a_pipeline_with_several_rewards_says_which_one_scores(run, tmp_path):
    given = {
        "sft_policy": str(run / "sft"),
        "reward_model": [str(run / "reward_model"), "alice/second"],
        "reward_funcs": ["rewards.py:short"],
    }
    folder = pipeline_in(tmp_path / "mine", given, {})
    plan = make_plan(CastArguments(model=[str(folder)]))
    assert plan.reward_model == str(run / "reward_model")
    assert plan.notes[0].startswith("reward model alice/second left out")
    assert plan.notes[1].startswith("rewards.py:short is not run") and len(plan.notes) == 2
    assert "add --reward_funcs rewards.py:short" in plan.notes[1]
    plan = make_plan(CastArguments(model=[str(folder)], reward_model=str(run / "reward_model")))
    assert len(plan.notes) == 1 and "--reward_funcs rewards.py:short" in plan.notes[0]


def test_the_reward_of_an_answer_is_the_sum_with_the_functions_that_the_user_names(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def turns(prompts, completions): return [float(len(prompt)) for prompt in prompts]\n"
        "def offline(completions): raise ConnectionError('no server')\n"
    )
    folder = shutil.copytree(run, tmp_path / "mine")
    (folder / "pipeline.yaml").write_text('{"reward_funcs": ["rewards.py:turns"], "reward_weights": [0, 10]}')
    (folder / "policy" / "training_config.yaml").write_text("max_completion_length: 16\n")
    args = CastArguments(model=[str(folder)], reward_funcs=["rewards.py:turns"])
    plan = make_plan(args)
    assert plan.notes == [] and plan.note_on_length(16) is None and "16 (--max_new" in plan.note_on_length(256)
    session = session_of(load_cast(plan, args))
    rewards = []
    for question in ("One?", "Two?"):
        session.take(question)
        rewards.append(session.view.ended["policy"][1])
    assert rewards == [10.0, 30.0] and session.cast.scorer.formula == "reward = 0 × reward model + 10 × turns"
    session.cast.scorer = RewardSum(None, [reward_function("rewards.py:offline", "reward_funcs")], [1.0])
    session.take("Three?")
    assert session.view.ended["policy"][1] is None and "no server" in session.view.ended["policy"][2]


def test_a_file_that_changed_after_training_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def short(completions): return [0.0 for _ in completions]\n")
    given = {
        "sft_policy": str(run / "sft"),
        "reward_model": [str(run / "reward_model")],
        "reward_funcs": ["rewards.py"],
    }
    folder = pipeline_in(tmp_path / "mine", given, {"ppo.reward_funcs": {"short": "local rewards.py (sha256 12)"}})
    plan = make_plan(CastArguments(model=[str(folder)], reward_funcs=["rewards.py:short"]))
    assert len(plan.notes) == 1 and "differs from what PPO was trained with" in plan.notes[0]


def test_a_run_with_functions_alone_says_that_there_is_no_score(run, tmp_path):
    folder = pipeline_in(tmp_path / "mine", {"sft_policy": str(run / "sft"), "reward_funcs": ["$(rm x).py:f"]}, {})
    plan = make_plan(CastArguments(model=[str(folder)]))
    # The name is someone else's text: pasted into a shell, it must stay one word.
    assert plan.reward_model is None and plan.notes == [
        "$(rm x).py:f is not run, as the folder could name any code: add --reward_funcs '$(rm x).py:f'; until then, "
        "answers have no score"
    ]


def test_a_folder_that_was_given_and_is_gone_is_not_taken_for_a_hub_id(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"sft_policy": "runs/sft", "reward_model": ["runs/reward"]}
    settings = {"sft_policy": "local sft (sha256 12)", "reward_model": ["local reward (sha256 34)"]}
    folder = pipeline_in(tmp_path / "mine", given, settings)
    shutil.copytree(run / "policy", folder / "policy")
    plan = make_plan(CastArguments(model=[str(folder)]))
    assert [spec.name for spec in plan.specs] == ["base", "policy"] and plan.reward_model is None
    assert len(plan.notes) == 2 and "runs/sft is not there" in plan.notes[0]


def test_a_whole_model_that_was_given_has_no_other_base(run, tmp_path):
    given = {"sft_policy": str(run.parent / "base"), "model_name_or_path": EMBEDDED_MODEL}
    found = find_models(pipeline_in(tmp_path / "mine", given, {"model": EMBEDDED_MODEL}))
    assert (found.base, found.sft) == (None, given["sft_policy"])
    given = {"model_name_or_path": "alice/base", "model_revision": "abc"}
    folder = pipeline_in(tmp_path / "full", given, {})
    shutil.copytree(run.parent / "base", folder / "sft")
    found = find_models(folder)
    assert (found.base, found.base_revision) == ("alice/base", "abc")


@pytest.mark.parametrize("texts, expected", [(["Be brief."] * 3, "Be brief."), (["Be brief.", "Be long."], None)])
def test_the_system_text_of_the_data_is_that_of_the_run(tmp_path, texts, expected):
    folder = pipeline_in(tmp_path / "mine", {"sft_policy": "alice/sft"}, {})
    (folder / "data" / "prompts").mkdir(parents=True)
    rows = [{"prompt": [{"role": "system", "content": text}, *QUESTION]} for text in texts]
    (folder / "data" / "prompts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert system_of_data(folder) == expected
    (folder / "data" / "prompts" / "train.jsonl").write_text('{"prompt": "text"}\n')
    assert system_of_data(folder) is None


def test_models_are_asked_with_the_system_text_of_their_cards(run, tmp_path):
    folders = []
    for name, text in (("one", "Be brief."), ("two", "Be long.")):
        folders.append(shutil.copytree(run / "sft", tmp_path / name))
        (folders[-1] / "report.json").write_text(json.dumps({"card": {"system_prompt": text}}))
    plan = make_plan(CastArguments(model=[str(run / "policy"), str(folders[0])]))
    assert plan.system == "Be brief." and plan.notes == []
    plan = make_plan(CastArguments(model=[str(folder) for folder in folders]))
    assert plan.system is None and "--system" in plan.notes[0]


def test_the_last_round_with_a_policy_is_taken(run, tmp_path):
    rounds = tmp_path / "rounds"
    for number in (1, 2, 10):
        (rounds / f"round-{number}").mkdir(parents=True)
    for name in ("policy", "reward_model"):
        shutil.copytree(run / name, rounds / "round-2" / name)
    settings = {"model": str(run / "sft")}
    (rounds / "manifest.json").write_text(json.dumps({"settings": settings, "stages": {}}))
    found = find_models(rounds)
    assert found.policy == str(rounds / "round-2" / "policy") and found.sft == str(run / "sft")
    assert found.base == str(run.parent / "base")


def test_without_words_the_embedded_model_answers(monkeypatch):
    from hf_rlhf_ext.recipes.chat_parts import models, plan

    monkeypatch.setattr(plan, "_check_model", lambda spec, code: None)
    (spec,) = make_plan(CastArguments()).specs
    assert spec.location == EMBEDDED_MODEL and PromptForm.load(spec.location).prompt_form is None
    assert models._precision(spec, CastArguments()) == {"dtype": "auto", "load_in_4bit": False}


def test_words_outside_of_options_are_models(run):
    words = ["--temperature", "0.5", "a", "--greedy", "b", "--load_in_4bit", "false", "c", "--seed=3", "d"]
    positionals, rest = split_positionals(chat.ARGUMENTS, words)
    assert positionals == ["a", "b", "c", "d"] and len(rest) == 6
    args, options = chat.parse([str(run), "--greedy", "--max_new_tokens", "5"])
    assert args.model == [str(run)] and options.is_greedy and options.max_new_tokens == 5
    args, _ = chat.parse(["--model", "a", "b", "--seed", "1"])
    assert args.model == ["a", "b"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["./nope"], "model: no folder at ./nope"),
        (["nope/nope"], "nope/nope is no folder here, and as a Hub id"),
        (["{run}", "{run}/policy"], "give it alone"),
        (["{run}/reward_model"], "give it as --reward_model"),
        (["{run}/empty"], "has no model"),
        (["{parent}"], "which is in it"),
        (["{run}/sft", "{run}/sft"], "given twice"),
        (["{run}", "--model", "a"], "in one place"),
        (["{run}", "--reward_model", "./nope"], "no folder at ./nope"),
        (["{run}", "--reward_model", "{run}/sft"], "reward_model: "),
        (["{run}", "--reward_model", "{run}/empty"], "reward_model: "),
        (["{unfinished}"], "run its command again"),
        (["{run}", "--temperature", "-1"], "temperature must be at least 0"),
        (["{run}", "--top_p", "0"], "top_p must be above 0"),
        (["{run}", "What is rain?"], "type questions when the chat has begun"),
        (["{run}", "--seed", str(2**64)], "seed must be from 0"),
        (["{run}", "--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["{run}", "--temprature", "1"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(run, words, said, monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "load_cast", lambda *args: pytest.fail("a model was loaded"))
    (run / "empty").mkdir(exist_ok=True)
    (tmp_path / "new" / "sft").mkdir(parents=True)
    places = {"run": run, "parent": run.parent, "unfinished": tmp_path / "new"}
    with pytest.raises(UserError) as caught:
        args, options = chat.parse([word.format(**places) for word in words])
        chat.chat(args, options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# As a process


OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_questions_from_a_pipe_are_answered_in_plain_lines(run, recipes_path):
    questions = b"What is rain?\n\n/new\nWhat is \xff snow?\n/quit\nnever asked\n"
    command = [sys.executable, str(recipes_path / "chat.py"), str(run), "--max_new_tokens", "8"]
    done = subprocess.run(command, input=questions, env=os.environ | OFFLINE, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.decode().splitlines() if not line.startswith("    ")]
    names = [line.split(" (reward ")[0] for line in lines]
    assert names == ["base", "sft", "policy"] * 2
    assert "%|" not in done.stderr.decode() and "you>" not in done.stdout.decode() and b"\x1b" not in done.stdout


class Terminal:
    """The other side of a terminal: what a program shows there, piece by piece."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.unread = ""

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def until(self, wanted: str, seconds: float = 200) -> str:
        """What is shown up to a text. Fails if it does not come."""
        end = time.monotonic() + seconds
        while wanted not in self.unread:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, end - time.monotonic()))
            try:
                new = os.read(self.descriptor, 4096) if ready else b""
            except OSError:  # the program has closed the terminal
                new = b""
            if not new:
                pytest.fail(f"{wanted!r} was not shown, but {self.unread[-800:]!r}")
            self.unread += new.decode(errors="replace")
        before, _, self.unread = self.unread.partition(wanted)
        return before


def forked_chat(words: list[str]) -> tuple[int, int]:
    """Runs the recipe in a terminal, in a copy of this process, which saves the imports. Returns pid and terminal."""
    child, terminal = pty.fork()
    if child:
        return child, terminal
    code = 1
    try:  # a copy of the test run must never go on with the tests
        os.environ["TERM"] = "dumb"
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
        sys.argv = ["chat.py", *words]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        chat.run_recipe(chat.main)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    finally:
        os._exit(code)


@pytest.mark.slow
def test_a_terminal_shows_prompts_streams_and_ends_at_ctrl_d(run, tmp_path):
    saved = save_adapter(run.parent / "base", tmp_path / "loops", load_policy(run / "sft")[1], seed=3)
    child, descriptor = forked_chat([str(saved), "--greedy", "--max_new_tokens", "400"])
    terminal = Terminal(descriptor)
    try:
        assert "/help" in terminal.until("you> ")
        terminal.type(b"a sunny day\n")
        terminal.until("loops\r\n")
        terminal.until("x")  # the answer has begun: this adapter repeats itself
        terminal.type(b"\x03")  # Ctrl-C
        assert "stopped" in terminal.until("you> ")
        terminal.type(b"/max 3\n")
        terminal.until("at most 3 tokens")
        terminal.until("you> ")
        terminal.type(b"\x04")  # Ctrl-D
        _, status = os.waitpid(child, 0)
        child = None
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(descriptor)
        if child is not None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
